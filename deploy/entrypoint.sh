#!/bin/sh
# Makes CANN known to the process where it is installed, then becomes the command: signals reach it, not a shell.
set -e
for script in /usr/local/Ascend/cann/set_env.sh /usr/local/Ascend/ascend-toolkit/set_env.sh; do # since 8.5; before
    if [ -f "$script" ]; then
        # shellcheck disable=SC1090
        . "$script"
        break
    fi
done
exec "$@"
