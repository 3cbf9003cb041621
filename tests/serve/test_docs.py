"""The examples of docs/serving.md, run as they stand: only the address is another one."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import soundfile
from serve.harness import Running

from covo_npu.runtime import CovoAudio, Session

ROOT = Path(__file__).resolve().parents[2]
QUESTION = ROOT / "tests/data/audio/question_zh_44k_stereo.wav"


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs/serving.md").read_text("utf-8"), re.S)


def run(command: list[str], folder: Path) -> str:
    shutil.copy(QUESTION, folder / "question.wav")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_curl(model: CovoAudio, running: Running, tmp_path: Path) -> None:
    (command,) = [example for example in examples("sh") if "curl" in example]
    out = run(["bash", "-c", command.replace("http://127.0.0.1:8000", running.url)], tmp_path)
    reply = Session(model).say(QUESTION)
    assert out == reply.text + "\n"
    assert soundfile.info(tmp_path / "reply.wav").frames == reply.waveform.size


def test_the_official_client(model: CovoAudio, running: Running, tmp_path: Path) -> None:
    (program,) = examples("python")
    out = run([sys.executable, "-c", program.replace("http://127.0.0.1:8000", running.url)], tmp_path)
    assert out == Session(model).say(QUESTION).text
