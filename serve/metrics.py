"""What Prometheus is told: how many questions, how long they waited, how fast they were answered, how busy it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from covo_npu.runtime.audio import SAMPLE_RATE
from covo_npu.runtime.events import Audio, Done, Event, Text

SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0, 34.0, 60.0, 120.0)
RTF = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 5.0)


class Metrics:
    """The families of one server. May be used from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.success = self._counter("requests_success", "Replies that ended well", "finished_reason")
        self.fail = self._counter("requests_fail", "Questions without a whole reply", "reason")
        self.queue_s = self._histogram("request_queue_time_seconds", "Wait for a slot")
        self.ttft_s = self._histogram("time_to_first_token_seconds", "To the first text")
        self.ttfp_s = self._histogram("audio_ttfp_seconds", "To the first packet of audio")
        self.latency_s = self._histogram("e2e_request_latency_seconds", "To the end of the reply")
        self.audio_s = self._histogram("audio_duration_seconds", "Speech of a reply")
        self.rtf = self._histogram("audio_rtf", "Seconds to the last audio, a second of speech", RTF)
        self.underruns = self._counter("audio_underrun", "Pauses of playback of a stream because audio came late")
        self.underrun_s = self._counter("audio_underrun_seconds", "Length of these pauses")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts, without the rounds before")
        self.tokens = self._counter("generation_tokens", "Tokens of replies", "kind")
        self.http = self._counter("http_requests", "Requests by status", "path", "status")
        self.vad_s = self._histogram("vad_seconds", "Time to judge a piece of audio")
        self.turns = self._counter("realtime_turns", "Turns that voice activity detection ended")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"covo_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float] = SECONDS) -> Histogram:
        return Histogram(f"covo_{name}", text, buckets=buckets, registry=self.registry)

    def watch(self, gauges: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        """Let gauges be read when somebody asks: name -> (what it is, its value)."""
        for name, (text, value) in gauges.items():
            Gauge(f"covo_{name}", text, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self.registry)


class Meter:
    """The course of one reply, event by event; playback of a stream is thought to start with the first audio."""

    def __init__(self, metrics: Metrics, streamed: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """streamed: whether audio is sent while it is made; else it is played when all of it is there."""
        self._metrics, self._streamed, self._clock = metrics, streamed, clock
        self.asked = clock()
        self._texts = self._samples = 0
        self._last_audio = 0.0
        self._played_until = 0.0  # when playback will have used up what it has

    @property
    def age_s(self) -> float:
        """Seconds since the question was asked."""
        return self._clock() - self.asked

    def began(self) -> None:
        """The question has left the queue."""
        self._metrics.queue_s.observe(self.age_s)

    def see(self, event: Event) -> None:
        """Note an event when it happens."""
        if isinstance(event, Text):
            self._texts += 1
            if self._texts == 1:
                self._metrics.ttft_s.observe(self.age_s)
        elif isinstance(event, Audio) and event.samples.size:
            self._hear(event)
        elif isinstance(event, Done):
            self._finish(event)

    def _hear(self, event: Audio) -> None:
        self._last_audio = now = self._clock()
        if not self._samples:
            self._metrics.ttfp_s.observe(now - self.asked)
            self._played_until = now
        elif self._streamed and (late := now - self._played_until) > 0:
            self._metrics.underruns.inc()
            self._metrics.underrun_s.inc(late)
            self._played_until = now
        self._samples += event.samples.size
        self._played_until += event.samples.size / SAMPLE_RATE

    def _finish(self, event: Done) -> None:
        metrics, reply = self._metrics, event.reply
        metrics.success.labels(reply.stop_reason).inc()
        metrics.latency_s.observe(self.age_s)
        metrics.prompt_tokens.inc(reply.prompt_tokens)
        metrics.tokens.labels("audio").inc(len(reply.audio_codes))
        metrics.tokens.labels("text").inc(len(reply.tokens) - len(reply.audio_codes))
        if self._samples:
            seconds = self._samples / SAMPLE_RATE
            metrics.audio_s.observe(seconds)
            metrics.rtf.observe((self._last_audio - self.asked) / seconds)
