"""What a server is started with, and the service that comes of it: in this process, or in each of many replicas."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from covo_npu.kernels.errors import CovoError
from covo_npu.runtime.cli.options import SpeechOptions
from covo_npu.runtime.options import LoadOptions
from covo_npu.serve.settings import Settings

if TYPE_CHECKING:
    from covo_npu.runtime.model import CovoAudio
    from covo_npu.runtime.voice import Voice
    from covo_npu.serve.service import Service


@dataclass(frozen=True, slots=True)
class Launch:
    """All that a command line says of a server but its address. It can be sent to another process.

    speech and voices complete the settings once the checkpoint is loaded; log: a form of logs.FORMS; threads: of the
    CPU, None: PyTorch's choice.
    """

    ckpt: Path
    options: LoadOptions
    settings: Settings
    speech: SpeechOptions
    voices: Path | None = None
    log: str = "text"
    threads: int | None = None

    def anywhere(self) -> Launch:
        """Return the same with paths that hold in another process of this machine, whatever its folder is."""
        speech = dataclasses.replace(self.speech, voice=self.speech.voice and self.speech.voice.absolute())
        voices = self.voices and self.voices.absolute()
        return dataclasses.replace(self, ckpt=self.ckpt.absolute(), speech=speech, voices=voices)

    def service(self) -> Service:
        """Return the service of the loaded checkpoint; its worker is not started, the log is.

        Its model is to be closed. Raises CheckpointError, ConfigError, BackendError, RankError and OSError.
        """
        from covo_npu.runtime import CovoAudio, Engine
        from covo_npu.serve import logs
        from covo_npu.serve.service import Service

        with contextlib.ExitStack() as if_it_fails:
            model = if_it_fails.enter_context(CovoAudio.load(self.ckpt, self.options))
            ask = self.settings.ask
            ask = self.speech.completed(ask, model) if model.can_speak else ask
            settings = dataclasses.replace(self.settings, ask=ask, voices=self._voices(model))
            logs.configure(self.log)
            service = Service(Engine(model, settings.slots), settings)
            if_it_fails.pop_all()
        return service

    def _voices(self, model: CovoAudio) -> dict[str, Voice]:
        """Return the voices of --voices, by name. Raises ConfigError, and OSError."""
        if self.voices is None:
            return {}
        from covo_npu.runtime.voice import read_voices

        if model.config.token2wav is None or not model.can_speak:
            raise CovoError("a server that answers in text only has no voices: leave out --voices")
        return read_voices(self.voices, model.config.token2wav.dit)
