"""The source checkpoint: every tensor it holds, checked against its index, nothing read but headers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from covo_npu.convert.config import CONFIG, model_config, token2wav_config
from covo_npu.convert.downloads import check_downloads, source_folder
from covo_npu.convert.shards import INDEX, SourceTensor, read_shards, shard_names
from covo_npu.convert.speech import TOKEN2WAV, find_voice, speech_files, speech_tensors
from covo_npu.convert.tokenizer import TokenizerFiles, read_tokenizer, tokenizer_files
from covo_npu.runtime.checkpoint.config import ModelConfig, VoiceConfig
from covo_npu.runtime.checkpoint.limits import require_plausible


@dataclass(frozen=True, slots=True)
class SourceCheckpoint:
    """A checked source checkpoint."""

    folder: Path
    config: ModelConfig
    tensors: Mapping[str, SourceTensor]
    tokenizer: TokenizerFiles
    small_files: Mapping[str, Path]  # files that are no tensors: name for the manifest -> where
    warnings: tuple[str, ...]


def open_source(src: Path, voice: Path | None = None, token2wav: bool = True) -> SourceCheckpoint:
    """Return the source checkpoint in a folder, its index checked against its shards.

    src: the folder of the weights, or a cache folder of `hf download` with one snapshot in it.
    voice: where the voice's .npy files lie; None: <folder>/token2wav/prompt, then <folder>/../token2wav/prompt.
    token2wav: False leaves speech out, its files need not exist.
    Raises ConvertError with all findings of each kind.
    """
    folder = source_folder(src)
    odd = check_downloads(folder, _files(folder, voice, token2wav))
    config = model_config(folder / CONFIG)
    shards = read_shards(folder)
    tokenizer = read_tokenizer(folder, config.audio_token_index)
    small = [CONFIG, *([INDEX] if shards.indexed else []), *(path.name for path in tokenizer.files)]
    tensors, warnings = shards.tensors, (*odd, *shards.warnings)
    require_plausible(config, f"{folder}: {CONFIG}")
    if token2wav:
        tensors = {**tensors, **speech_tensors(folder)}
        speech = token2wav_config(folder / TOKEN2WAV / CONFIG)
        config = replace(config, token2wav=speech)
        require_plausible(config, f"{folder}: {CONFIG} and {TOKEN2WAV}/{CONFIG}")
        found, voice_tensors, missing = find_voice(folder, voice, speech.dit)
        config = replace(config, token2wav=replace(speech, voice=VoiceConfig(found.num_codes, found.num_frames)))
        tensors, warnings = {**tensors, **voice_tensors}, (*warnings, *missing)
        small += [name] if (folder / (name := f"{TOKEN2WAV}/{CONFIG}")).exists() else []
    return SourceCheckpoint(folder, config, tensors, tokenizer, {name: folder / name for name in small}, warnings)


def _files(folder: Path, voice: Path | None, token2wav: bool) -> dict[str, Path]:
    """Return the files that a conversion would read, by their names in messages; some may not be there."""
    names = (CONFIG, INDEX, *shard_names(folder), *tokenizer_files(folder))
    return {name: folder / name for name in names} | (speech_files(folder, voice) if token2wav else {})
