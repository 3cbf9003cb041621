"""Chat completions and models through the official client: same replies as a session's, and OpenAI's words for all."""

from __future__ import annotations

import base64
import io
import json
import shutil
import time
import wave
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import soundfile
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import TypeAdapter
from serve.harness import CHINESE, ENGLISH, LONG, MODEL, Running, b64, serving, spoken
from serve.test_security import ask

from covo_npu.runtime import Ask, CovoAudio, Engine, Reply, Sampling, Session, audio, wav
from covo_npu.runtime.engine import ContextError
from covo_npu.runtime.options import SpeechBlocks
from covo_npu.runtime.voice import read_voice
from covo_npu.serve.service import Service
from covo_npu.serve.settings import Settings

SPEECH: dict[str, Any] = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}
STREAM: dict[str, Any] = {**SPEECH, "audio": {"voice": "alloy", "format": "pcm16"}, "stream": True}
OWN = {"top_k": 20, "repetition_penalty": 1.2, "window_penalty": 1.1, "window": 5}
WARM = Ask(sampling=Sampling(0.8, 20, 0.9, 1.2, 1.1, 5), max_new_tokens=60, seed=7)
WARM_REQUEST: dict[str, Any] = {
    "temperature": 0.8, "top_p": 0.9, "seed": 7, "max_completion_tokens": 60, "extra_body": OWN,
}  # fmt: skip


@pytest.fixture
def client(running: Running) -> openai.OpenAI:
    return running.client()


def create(client: openai.OpenAI, messages: list[Any], **options: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def checked(kind: type, value: Any) -> Any:
    """The client parses without checking; here the value is checked against its type."""
    return TypeAdapter(kind).validate_python(value.to_dict(mode="json"), strict=False)


def wav_bytes(reply: Reply, folder: Path) -> bytes:
    wav.write_wav(folder / "reply.wav", reply.waveform)
    return (folder / "reply.wav").read_bytes()


def following(audio_id: str) -> dict[str, Any]:
    return {"role": "assistant", "audio": {"id": audio_id}}


def test_a_dialogue_is_that_of_a_session(model: CovoAudio, client: openai.OpenAI, tmp_path: Path) -> None:
    """Two rounds and a third, whole; the WAV is byte for byte what covo-run writes."""
    chat, messages = Session(model, WARM), []
    for path in (ENGLISH, CHINESE, ENGLISH):
        before = chat.dialogue.length
        reply = chat.say(path)
        messages.append(spoken(path))
        found = checked(ChatCompletion, create(client, messages, **SPEECH, **WARM_REQUEST))
        [choice] = found.choices
        assert choice.message.content is None and choice.message.role == "assistant"
        heard = choice.message.audio
        assert heard.transcript == reply.text
        assert base64.b64decode(heard.data) == wav_bytes(reply, tmp_path)
        assert choice.finish_reason == {"stop": "stop", "length": "length"}[reply.stop_reason]
        assert found.usage.prompt_tokens == before + reply.prompt_tokens
        assert found.usage.prompt_tokens_details.cached_tokens == before
        assert found.usage.completion_tokens == len(reply.tokens)
        assert found.usage.completion_tokens_details.audio_tokens == len(reply.audio_codes)
        assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
        assert abs(heard.expires_at - time.time() - 3600) < 60 and found.model == MODEL
        messages.append(following(heard.id))
    assert len({m["audio"]["id"] for m in messages if "audio" in m}) == 3


def test_a_stream_of_speech(model: CovoAudio, client: openai.OpenAI) -> None:
    """Chunks in OpenAI's order; all of them together are the reply, however they are put together."""
    reply = Session(model, max_new_tokens=2048, blocks=SpeechBlocks()).say(ENGLISH)
    found = list(create(client, [spoken(ENGLISH)], **STREAM, stream_options={"include_usage": True}))
    chunks = [checked(ChatCompletionChunk, chunk) for chunk in found]
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    *told, last = chunks
    assert last.choices == [] and last.usage.completion_tokens == len(reply.tokens)
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in told)
    deltas = [chunk.choices[0].delta for chunk in told]
    assert deltas[0].role == "assistant" and deltas[0].audio is None
    spoken_parts = [delta.audio for delta in deltas[1:-1]]
    assert "".join(part.transcript or "" for part in spoken_parts) == reply.text
    data = [part.data for part in spoken_parts if part.data]
    pcm = b"".join(base64.b64decode(piece) for piece in data)
    assert pcm == audio.to_pcm16(reply.waveform) == base64.b64decode("".join(data))
    assert max(len(piece) for piece in data) < 65_536
    ids = [part.id for part in spoken_parts if part.id]
    assert spoken_parts[0].id and next(part for part in spoken_parts if part.data).id and len(set(ids)) == 1
    assert [n for n, part in enumerate(spoken_parts) if part.expires_at] == [len(spoken_parts) - 1]
    assert [chunk.choices[0].finish_reason for chunk in told] == [None] * (len(told) - 1) + ["stop"]
    assert deltas[-1].model_dump(exclude_none=True) == {}


def test_the_clients_stream_helper_puts_it_together(model: CovoAudio, client: openai.OpenAI) -> None:
    """It adds texts up, also of keys it does not know: base64 must not be padded in between."""
    reply = Session(model).say(ENGLISH)  # to its end: the helper raises for a length that is reached
    options = {key: value for key, value in STREAM.items() if key != "stream"}
    with client.chat.completions.stream(model=MODEL, messages=[spoken(ENGLISH)], **options) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message.to_dict()
    assert message["audio"]["transcript"] == reply.text
    assert base64.b64decode(message["audio"]["data"]) == audio.to_pcm16(reply.waveform)


def test_text_alone(model: CovoAudio, client: openai.OpenAI) -> None:
    reply = Session(model, mode="a2t", max_new_tokens=80).say(ENGLISH)
    whole = checked(ChatCompletion, create(client, [spoken(ENGLISH)], max_tokens=80))
    assert whole.choices[0].message.content == reply.text and whole.choices[0].message.audio is None
    chunks = [
        checked(ChatCompletionChunk, chunk)
        for chunk in create(client, [spoken(ENGLISH)], max_completion_tokens=80, stream=True)
    ]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == reply.text
    assert not any(chunk.choices[0].delta.audio for chunk in chunks) and "usage" not in chunks[0].model_fields_set


def test_a_text_dialogue_goes_on_from_the_text_of_its_replies(model: CovoAudio, client: openai.OpenAI) -> None:
    """A client that knows nothing of ids sends back what it was told; the server finds what it computed then."""
    chat, messages = Session(model, mode="a2t", max_new_tokens=40), []
    for n, path in enumerate((ENGLISH, CHINESE, ENGLISH)):
        messages.append(spoken(path))
        before = chat.dialogue.length
        found = create(client, messages, max_completion_tokens=40)
        assert found.choices[0].message.content == chat.say(path).text
        assert found.usage.prompt_tokens_details.cached_tokens == before and (before > 0) == (n > 0)
        messages.append({"role": "assistant", "content": found.choices[0].message.content})
    messages[1] = {"role": "assistant", "content": "I never said that."}
    with pytest.raises(openai.NotFoundError, match=r"messages\[5\]\.content"):
        create(client, [*messages, spoken(ENGLISH)], max_completion_tokens=40)


def test_a_dialogue_may_branch(model: CovoAudio, client: openai.OpenAI) -> None:
    """Two different second questions after the same first reply, one after the other and at once."""
    first = create(client, [spoken(ENGLISH)], **SPEECH, max_completion_tokens=30).choices[0].message.audio.id
    expected = {}
    for path in (CHINESE, ENGLISH):
        chat = Session(model, max_new_tokens=30)
        chat.say(ENGLISH)
        expected[path] = chat.say(path).text
    begin = [spoken(ENGLISH), following(first)]
    streams = {path: create(client, [*begin, spoken(path)], **STREAM, max_completion_tokens=30) for path in expected}
    texts = {
        path: "".join(chunk.choices[0].delta.audio.transcript or "" for chunk in stream if chunk.choices[0].delta.audio)
        for path, stream in streams.items()
    }
    assert texts == expected
    again = create(client, [*begin, spoken(CHINESE)], **SPEECH, max_completion_tokens=30)
    assert again.choices[0].message.audio.transcript == expected[CHINESE]


@pytest.mark.parametrize("limit", ["_keep_s", "_limit_bytes"])
def test_dialogues_that_begin_alike_go_on_and_are_forgotten_apart(model: CovoAudio, limit: str) -> None:
    """The same question and reply twice: the audio's ids tell them apart, and the text finds the one that is left."""
    chat = Session(model, max_new_tokens=10)
    begun, then = chat.say(ENGLISH).text, chat.say(CHINESE).text
    asked = {**SPEECH, "max_completion_tokens": 10}
    with serving(model) as running:
        client = running.client()
        firsts = [create(client, [spoken(ENGLISH)], **asked).choices[0].message.audio for _ in range(2)]
        assert [heard.transcript for heard in firsts] == [begun] * 2
        going_on = [[spoken(ENGLISH), following(heard.id), spoken(CHINESE)] for heard in firsts]
        for messages in reversed(going_on):  # the one that began first is used last
            assert create(client, messages, **asked).choices[0].message.audio.transcript == then
        dialogues = running.service.worker.dialogues
        earlier, later = dialogues._held
        running.service.worker.post(lambda: dialogues.forget(earlier))
        by_text = [spoken(ENGLISH), {"role": "assistant", "content": begun}, spoken(CHINESE)]
        assert create(client, by_text, **asked).choices[0].message.audio.transcript == then
        assert later in dialogues and earlier not in dialogues
        setattr(dialogues, limit, 0)
        assert create(client, [spoken(ENGLISH)], **asked).choices[0].message.audio.transcript == begun
        for messages in going_on:
            with pytest.raises(openai.NotFoundError, match="is not here any more"):
                create(client, messages, **asked)
        assert len(dialogues) == 0 and not dialogues._turns and running.service.worker.state == "ready"


def test_requests_with_settings_of_their_own_side_by_side(model: CovoAudio, client: openai.OpenAI) -> None:
    options = [{"temperature": 0.9, "seed": n, "max_completion_tokens": 20 + n} for n in range(6)]
    streams = [create(client, [spoken(ENGLISH)], stream=True, **option) for option in options]
    for option, stream in zip(options, streams, strict=True):
        ask = Ask(
            "a2t",
            Sampling(temperature=0.9),
            max_new_tokens=option["max_completion_tokens"],
            seed=option["seed"],
        )
        found = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert found == Session(model, ask).say(ENGLISH).text


def test_a_system_prompt_is_that_of_covo_run(model: CovoAudio, client: openai.OpenAI) -> None:
    text = "Answer in one word.\n\nIn English."
    expected = Session(model, mode="a2t", max_new_tokens=20, system=text).say(ENGLISH).text
    for messages in (
        [{"role": "system", "content": "Answer in one word."}, {"role": "developer", "content": "In English."}],
        [{"role": "system", "content": [{"type": "text", "text": text}]}],
    ):
        found = create(client, [*messages, spoken(ENGLISH)], max_completion_tokens=20)
        assert found.choices[0].message.content == expected


PCM_DATA = "data:Audio/PCM; rate=24000;channels=1;base64"


def as_flac(path: Path) -> bytes:
    samples, rate = soundfile.read(path, dtype="int32")
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="FLAC", subtype="PCM_24")
    return file.getvalue()


@pytest.mark.parametrize("form", ["data", "flac", "pcm16", "audio_url", "pcm url", "pcm data", "two", "wrong name"])
def test_forms_of_a_question(model: CovoAudio, client: openai.OpenAI, form: str) -> None:
    """However it is sent, the model hears the same samples; two parts are one question."""
    waveform = model.waveform(ENGLISH)
    wav, pcm = ENGLISH.read_bytes(), audio.to_pcm16(waveform)
    part = {
        "data": {"type": "input_audio", "input_audio": {"data": f"data:audio/wav;base64,{b64(wav)}", "format": "wav"}},
        "flac": {"type": "input_audio", "input_audio": {"data": b64(as_flac(ENGLISH)), "format": "flac"}},
        "pcm16": {"type": "input_audio", "input_audio": {"data": b64(pcm), "format": "pcm16"}},
        "audio_url": {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{b64(wav)}"}},
        "pcm url": {"type": "audio_url", "audio_url": {"url": f"data:audio/pcm;base64,{b64(pcm)}"}},
        "pcm data": {"type": "input_audio", "input_audio": {"data": f"{PCM_DATA},{b64(pcm)}", "format": "pcm16"}},
        "two": {"type": "input_audio", "input_audio": {"data": b64(pcm[:48_000]), "format": "pcm16"}},
        "wrong name": {"type": "input_audio", "input_audio": {"data": b64(wav), "format": "mp3"}},
    }[form]
    rest = {"type": "input_audio", "input_audio": {"data": b64(pcm[48_000:]), "format": "pcm16"}}
    rounded = np.frombuffer(pcm, "<i2").astype(np.float32) / 32768
    expected = Session(model, mode="a2t", max_new_tokens=20)
    text = (expected.say(rounded, 24_000) if form.startswith("pcm") or form == "two" else expected.say(ENGLISH)).text
    content = [part, rest] if form == "two" else [part, {"type": "text", "text": "  "}]
    found = create(client, [{"role": "user", "content": content}], max_completion_tokens=20)
    assert found.choices[0].message.content == text


def test_compressed_questions_are_heard(client: openai.OpenAI) -> None:
    samples, rate = soundfile.read(ENGLISH)
    for container, subtype, name in (("MP3", "MPEG_LAYER_III", "mp3"), ("OGG", "VORBIS", "ogg")):
        file = io.BytesIO()
        soundfile.write(file, samples, rate, format=container, subtype=subtype)
        part = {"type": "input_audio", "input_audio": {"data": b64(file.getvalue()), "format": name}}
        found = create(client, [{"role": "user", "content": [part]}], max_completion_tokens=3)
        assert found.usage.prompt_tokens_details.audio_tokens >= 30


@pytest.mark.parametrize(
    ("form", "exact"), [("wav", True), ("flac", True), ("pcm16", True), ("mp3", False), ("opus", False)]
)
def test_formats_of_speech(model: CovoAudio, client: openai.OpenAI, form: str, exact: bool) -> None:
    reply = Session(model).say(ENGLISH)
    found = create(client, [spoken(ENGLISH)], modalities=["text", "audio"], audio={"voice": "default", "format": form})
    data = base64.b64decode(found.choices[0].message.audio.data)
    expected = np.frombuffer(audio.to_pcm16(reply.waveform), "<i2")
    if form == "pcm16":
        samples = np.frombuffer(data, "<i2")
    else:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="int16")
        assert rate == 24_000 and samples.ndim == 1
    if form == "wav":
        with wave.open(io.BytesIO(data)) as file:
            assert (file.getnframes(), len(data)) == (
                expected.size,
                44 + 2 * expected.size,
            )  # nothing after the samples
    assert np.array_equal(samples, expected) if exact else abs(samples.size - expected.size) < 3000


def test_models(client: openai.OpenAI) -> None:
    [found] = client.models.list().data
    checked(Model, found)
    assert found.id == MODEL and client.models.retrieve(MODEL).id == MODEL and abs(found.created - time.time()) < 600
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-audio/x")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def saying(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def after_a_question(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [spoken(ENGLISH), *messages]}


def heard(data: str, form: str = "wav") -> dict[str, Any]:
    return saying({"type": "input_audio", "input_audio": {"data": data, "format": form}})


def at_url(url: str) -> dict[str, Any]:
    return saying({"type": "audio_url", "audio_url": {"url": url}})


def spoken_as(**audio: Any) -> dict[str, Any]:
    return {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav", **audio}}


HI = {"type": "text", "text": "hi"}
AT = "messages[0].content[0]"
DATA, URL = f"{AT}.input_audio.data", f"{AT}.audio_url.url"
SYSTEM = {"role": "system", "content": "x"}
SECOND = b64(bytes(48_000))
OTHER_SAMPLES = ("audio/pcm;rate=16000", "audio/pcm;channels=2", "audio/L16;rate=24000", "audio/pcmu", "Audio/PCMA")
CANNOT, INVALID, MISTYPED, NO_AUDIO = "unsupported_value", "invalid_value", "invalid_type", "invalid_audio"
WRONG: dict[str, tuple[dict[str, Any], str, str]] = {  # case: (what differs, code, param)
    "text question": ({"messages": [{"role": "user", "content": "How are you?"}]}, CANNOT, "messages[0].content"),
    "text beside audio": (saying(*spoken(ENGLISH)["content"], HI), CANNOT, "messages[0].content[1]"),
    "image": (saying({"type": "image_url", "image_url": {"url": "data:,"}}), CANNOT, AT),
    "no messages": ({"messages": []}, MISTYPED, "messages"),
    "no question": ({"messages": [SYSTEM]}, INVALID, "messages"),
    "reply last": (after_a_question({"role": "assistant", "content": "x"}), INVALID, "messages"),
    "empty reply": (after_a_question({"role": "assistant"}, spoken(ENGLISH)), INVALID, "messages[1]"),
    "late system": (after_a_question(SYSTEM), CANNOT, "messages[1]"),
    "tool message": ({"messages": [{"role": "tool", "content": "y"}]}, CANNOT, "messages[0]"),
    "role": ({"messages": [{"role": "owner", "content": "x"}]}, MISTYPED, "messages[0].role"),
    "no audio": (heard(b64(b"no sound")), NO_AUDIO, DATA),
    **{f"{kind} url": (at_url(f"data:{kind};base64,{SECOND}"), CANNOT, URL) for kind in OTHER_SAMPLES},
    **{f"{kind} data": (heard(f"data:{kind};base64,{SECOND}", "pcm16"), CANNOT, DATA) for kind in OTHER_SAMPLES},
    "address": (at_url("http://127.0.0.1/x.wav"), CANNOT, URL),
    "file": (at_url("file:///etc/passwd"), CANNOT, URL),
    "not base64": (heard("#"), NO_AUDIO, DATA),
    "half a sample": (heard(b64(b"abc"), "pcm16"), NO_AUDIO, DATA),
    "too short": (heard(b64(bytes(100)), "pcm16"), NO_AUDIO, DATA),
    "input format": (heard("", "aac"), CANNOT, f"{AT}.input_audio.format"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, CANNOT, "tools"),
    "n": ({"n": 2}, CANNOT, "n"),
    "logprobs": ({"logprobs": True}, CANNOT, "logprobs"),
    "stop": ({"stop": ["x"]}, CANNOT, "stop"),
    "json": ({"response_format": {"type": "json_object"}}, CANNOT, "response_format"),
    "bias": ({"logit_bias": {"1": 1}}, CANNOT, "logit_bias"),
    "frequency": ({"frequency_penalty": 0.5}, CANNOT, "frequency_penalty"),
    "temperature": ({"temperature": -1.0}, INVALID, "temperature"),
    "temperature type": ({"temperature": "hot"}, MISTYPED, "temperature"),
    "top_p": ({"top_p": 0}, INVALID, "top_p"),
    "tokens": ({"max_completion_tokens": 0}, INVALID, "max_completion_tokens"),
    "seed": ({"seed": 2**80}, INVALID, "seed"),
    "modality": ({"modalities": ["smell"]}, MISTYPED, "modalities[0]"),
    "speech without audio": ({"modalities": ["audio"]}, "missing_required_parameter", "audio"),
    "aac": (spoken_as(format="aac"), CANNOT, "audio.format"),
    "wav stream": ({**SPEECH, "stream": True}, CANNOT, "audio.format"),
    "voice": (spoken_as(voice="darth"), INVALID, "audio.voice"),
    "voice id": (spoken_as(voice={"id": "v"}), INVALID, "audio.voice"),
    "too long": ({"messages": [spoken(*[LONG] * 12)]}, "context_length_exceeded", "messages"),
    "placeholder": ({"messages": [{**SYSTEM, "content": "<|cAUDIO|>"}, spoken(ENGLISH)]}, INVALID, "messages"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_done_is_told(running: Running, client: openai.OpenAI, case: str) -> None:
    fields, code, param = WRONG[case]
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, **{"messages": [spoken(ENGLISH)], **fields})
    error = caught.value
    assert (error.code, error.param, error.type) == (code, param, "invalid_request_error"), error.message
    assert len(error.message) > 20 and error.request_id.startswith("req_")
    assert running.idle()


def test_parts_of_a_question_share_the_seconds_that_are_possible(running: Running, client: openai.OpenAI) -> None:
    """A file of 1 kB may last as long as any: what is beyond them all is not decoded, nor are questions of before."""

    def lasting(seconds: float) -> dict[str, Any]:
        file = io.BytesIO()
        soundfile.write(file, np.full(int(seconds), 0.1), 1, format="WAV", subtype="PCM_U8")
        return {"type": "input_audio", "input_audio": {"data": b64(file.getvalue()), "format": "wav"}}

    limit_s = running.service.max_seconds
    short = {"type": "input_audio", "input_audio": {"data": b64(bytes(960)), "format": "pcm16"}}
    for first_s, last, why in (
        (250, lasting(250), f"after 250.0 s of other parts: lasts 250.0 s, at most {limit_s - 250:.1f} s"),
        (limit_s, short, f"after {limit_s:.1f} s of other parts: lasts longer than the 0.0 s"),
    ):
        with pytest.raises(openai.BadRequestError, match=why) as caught:
            create(client, [{"role": "user", "content": [lasting(first_s)]}, {"role": "user", "content": [last]}])
        assert (caught.value.code, caught.value.param) == (NO_AUDIO, "messages[1].content[0].input_audio.data")
    with pytest.raises(openai.NotFoundError, match="dialogue"):
        before = {"role": "user", "content": [lasting(250), lasting(250)]}
        create(client, [before, following("audio_0"), spoken(ENGLISH)])


def test_a_system_prompt_that_no_context_holds_is_not_tokenised(
    running: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would keep the engine's thread from everybody's replies."""
    limit, encode, read = running.service.max_system_characters, running.service.model.tokenizer.encode, []
    monkeypatch.setattr(running.service.model.tokenizer, "encode", lambda text: read.append(len(text)) or encode(text))
    for length in (limit + 1, limit):
        with pytest.raises(openai.BadRequestError) as caught:
            create(client, [{"role": "system", "content": "a" * length}, spoken(ENGLISH)])
        assert caught.value.code == "context_length_exceeded"
        assert any(characters >= length for characters in read) == (length == limit)


def test_half_a_character_is_refused_wherever_it_stands(running: Running) -> None:
    """JSON can spell it, UTF-8 cannot: no answer could say it again."""
    later = [spoken(ENGLISH), following("\udfff"), spoken(ENGLISH)]
    for fields in (
        {"model": "\ud800"},
        {"user": "\udead"},
        {"\ud800": 1},
        {"audio": {"voice": {"id": "\ud83d"}, "format": "wav"}},
        {"messages": [{**SYSTEM, "content": "\ude00\ud83d"}, spoken(ENGLISH)]},
        {"messages": later},
    ):
        body = json.dumps({"model": MODEL, "messages": [spoken(ENGLISH)], **fields}).encode()
        status, _, answer = ask(running, "/v1/chat/completions", "POST", body)
        assert status == 400 and "JSON" in answer["error"]["message"], (fields, answer)


def test_what_is_ignored_does_no_harm(model: CovoAudio, client: openai.OpenAI) -> None:
    text = Session(model, mode="a2t", max_new_tokens=10).say(ENGLISH).text
    found = create(
        client, [spoken(ENGLISH)], max_completion_tokens=10, user="me", store=True, metadata={"a": "b"}, n=1, tools=[],
        frequency_penalty=0, response_format={"type": "text"}, extra_body={"never heard of": {"x": [1]}},
    )  # fmt: skip
    assert found.choices[0].message.content == text


def test_other_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-audio", messages=[spoken(ENGLISH)])
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="dialogue"):
        create(client, [spoken(ENGLISH), following("audio_0"), spoken(ENGLISH)])
    with pytest.raises(openai.NotFoundError, match="reads no text aloud") as caught:
        client.audio.speech.create(model=MODEL, voice="alloy", input="Hello.")
    assert caught.value.code == "unsupported_endpoint"
    with pytest.raises(openai.NotFoundError, match="there is no POST /v1/embeddings"):
        client.embeddings.create(model=MODEL, input="x")
    first = create(client, [{"role": "system", "content": "One."}, spoken(ENGLISH)], **SPEECH, max_completion_tokens=3)
    history = [spoken(ENGLISH), following(first.choices[0].message.audio.id), spoken(ENGLISH)]
    with pytest.raises(openai.BadRequestError, match="system prompt is not the one"):
        create(client, [{"role": "system", "content": "Two."}, *history])
    assert create(client, history, max_completion_tokens=3).usage.prompt_tokens_details.cached_tokens > 0


def test_a_dialogue_that_grows_beyond_the_context_says_so(model: CovoAudio, client: openai.OpenAI) -> None:
    messages: list[Any] = []
    chat = Session(model, mode="a2t", max_new_tokens=5)
    while True:
        messages.append(spoken(LONG))
        try:
            text = chat.say(LONG).text
        except ContextError:
            break
        found = create(client, messages, max_completion_tokens=5)
        assert found.choices[0].message.content == text
        messages.append({"role": "assistant", "content": text})
    assert len(messages) > 5
    with pytest.raises(openai.BadRequestError, match="the dialogue has") as caught:
        create(client, messages, max_completion_tokens=5)
    assert caught.value.code == "context_length_exceeded"
    messages[-3:] = [spoken(ENGLISH)]  # one round less leaves room for a short question
    assert create(client, messages, max_completion_tokens=5).choices[0].finish_reason in ("length", "stop")


def test_voices_side_by_side(model: CovoAudio, tiny_source: Path, tmp_path: Path) -> None:
    """Two voices and the checkpoint's at once; an unknown one is told which there are."""
    voices = {}
    for n, name in enumerate(("deep", "high"), 1):
        shutil.copytree(tiny_source / "token2wav" / "prompt", tmp_path / name)
        file = tmp_path / name / "speaker_embed.npy"
        np.save(file, np.load(file) + np.float32(0.3 * n))
        voices[name] = read_voice(tmp_path / name, model.speech.config.dit)
    names: list[Any] = ["default", "deep", {"id": "high"}]
    with serving(model, voices=voices) as running:
        client = running.client()
        options: list[dict[str, Any]] = [{**STREAM, "audio": {"voice": name, "format": "pcm16"}} for name in names]
        streams = [create(client, [spoken(ENGLISH)], **option) for option in options]
        found = []
        for stream in streams:
            parts = [chunk.choices[0].delta.audio for chunk in stream if chunk.choices[0].delta.audio]
            found.append(b"".join(base64.b64decode(part.data) for part in parts if part.data))
        expected = [
            Session(model, voice=voice, blocks=SpeechBlocks()).say(ENGLISH).waveform
            for voice in (None, *voices.values())
        ]
        assert found == [audio.to_pcm16(waveform) for waveform in expected] and len(set(found)) == 3
        with pytest.raises(openai.BadRequestError, match="there is: default, deep, high"):
            create(client, [spoken(ENGLISH)], **{**SPEECH, "audio": {"voice": "low", "format": "wav"}})


def test_a_voice_of_the_name_default_is_the_default_one(model: CovoAudio, tiny_source: Path) -> None:
    own = read_voice(tiny_source / "token2wav" / "prompt", model.speech.config.dit)
    service = Service(Engine(model), Settings(voices={"deep": own, "default": own}))
    assert service.voices == ["default", "deep"]
    assert all(service.ask(True, None, name, {}, {}, True).voice is own for name in (None, "default", "alloy"))


class Flaky(httpx2.HTTPTransport):
    """Counts what is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[httpx2.Request] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        return super().handle_request(request)


def test_a_full_server_is_tried_again_and_a_fault_is_not(model: CovoAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(model, slots=1, queue=0) as running:
        transport = Flaky()
        client = running.client(max_retries=2, http_client=httpx2.Client(transport=transport))
        with running.service.worker.place():
            with pytest.raises(openai.RateLimitError, match="all 1 places are taken") as caught:
                running.client().chat.completions.create(model=MODEL, messages=[spoken(ENGLISH)])
            assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
            with pytest.raises(openai.RateLimitError):
                create(client, [spoken(ENGLISH)])
            assert len(transport.requests) == 3
        text = create(client, [spoken(ENGLISH)], max_completion_tokens=5).choices[0].message.content
        assert running.idle()  # its place is free again
        transport.requests.clear()
        with monkeypatch.context() as once:
            once.setattr(running.service.worker.engine._decoder, "fill", lambda *_: 1 / 0)
            with pytest.raises(openai.InternalServerError, match="the reply failed") as caught:
                create(client, [spoken(ENGLISH)], max_completion_tokens=5)
        assert caught.value.code == "reply_failed" and len(transport.requests) == 1
        assert "division" not in str(caught.value.body)
        assert create(client, [spoken(ENGLISH)], max_completion_tokens=5).choices[0].message.content == text
        assert running.metric("requests_fail_total", reason="no place") == 4
        assert running.metric("requests_fail_total", reason="failed") == 1


def test_a_fault_in_the_middle_of_a_stream_is_an_error_event(
    model: CovoAudio, running: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CovoAudio, "speech_stream", lambda *_, **__: 1 / 0)
    heard = []
    with pytest.raises(openai.APIError, match="the reply failed") as caught:
        for chunk in create(client, [spoken(ENGLISH)], **STREAM):
            heard.append(chunk)
    assert heard and caught.value.code == "reply_failed" and running.idle()
    assert running.service.worker.state == "ready"
