"""The server's log on stderr, as lines for people or as JSON for machines: no audio and no text of a dialogue."""

from __future__ import annotations

import contextvars
import logging
import logging.config

FORMS = ("text", "json")
REQUEST_ID: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")


def configure(form: str) -> None:
    """Let the server, and uvicorn where it warns, log to stderr in a form of FORMS."""
    formatters = {
        "text": {"format": "%(asctime)s %(levelname)s [%(request_id)s] %(message)s"},
        "json": {
            "()": "pythonjsonlogger.json.JsonFormatter",
            "format": "%(asctime)s %(levelname)s %(name)s %(request_id)s %(message)s",
            "rename_fields": {"asctime": "time", "levelname": "level", "name": "logger"},
            "json_ensure_ascii": False,
        },
    }
    handler = {"class": "logging.StreamHandler", "formatter": form, "filters": ["request_id"]}
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {form: formatters[form]},
            "filters": {"request_id": {"()": RequestId}},
            "handlers": {"stderr": handler},
            "loggers": {
                "covo_npu.serve": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
                "uvicorn": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
            },
        }
    )


class RequestId(logging.Filter):
    """Notes in every record which request it belongs to."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = REQUEST_ID.get()
        return True
