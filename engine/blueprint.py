"""Blueprint: what a checkpoint's files and the user ask for, put together before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from carpool.engine.architecture import Architecture
from carpool.engine.checkpoint import Checkpoint
from carpool.engine.config import EngineConfig
from carpool.engine.cores import Cores
from carpool.engine.device import resolve_devices, resolve_dtype
from carpool.engine.errors import ConfigError
from carpool.engine.masked_lm import MaskedLM
from carpool.engine.models.loader import Loader
from carpool.engine.models.model import Model
from carpool.engine.pairing import Pairing
from carpool.engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """`notices` are on the choice of dtype and of what the model is for."""

    config: EngineConfig
    checkpoint: Checkpoint
    pairing: Pairing
    architecture: Architecture
    devices: tuple[torch.device, ...]
    dtype: torch.dtype
    max_model_len: int
    notices: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        """Where the model is loaded; it is copied to the others."""
        return self.devices[0]

    @property
    def workers(self) -> int:
        """One a GPU; on a CPU one a core this process may use, unless told otherwise."""
        if self.device.type != "cpu":
            return len(self.devices)
        return self.config.cpu_workers or Cores.here().workers

    @property
    def worker_cpus(self) -> tuple[tuple[int, ...], ...]:
        """The CPUs that each worker has to itself while all have work, () if they float.

        That of a GPU waits most of the time. Where they are fewer than cores they float unless it is asked for: which
        core has nothing else to do, the system knows.
        """
        pinned = self.config.pin_workers
        if self.device.type != "cpu" or pinned is False:
            return ()
        cores = Cores.here()
        return cores.each(self.workers) if pinned or self.workers == len(cores.cpus) else ()

    @classmethod
    def of(cls, config: EngineConfig, folder: Path) -> Blueprint:
        checkpoint = Checkpoint.read(folder, config.hf_overrides, config.pooler_config)
        pairing = Pairing.of(config, checkpoint)
        masked = MaskedLM.of(config, checkpoint)
        pooler = config.pooler_config
        architecture = Architecture.of(
            checkpoint.architectures,
            "classify" if pairing.scorer and config.convert == "auto" else config.convert,
            step_words=bool(pooler.steps and pooler.returned_token_ids),
            files=checkpoint.files or masked.kind,
        )
        devices = resolve_devices(config.device, config.data_parallel_size)
        device = devices[0]
        if config.quantization and device.type != "cpu":
            raise ConfigError("--quantization int8 is for CPUs: give --device cpu as well, or leave it out.")
        if config.cuda_graphs and device.type == "cpu":
            raise ConfigError("--cuda-graphs is for GPUs: give --device cuda as well, or leave it out.")
        dtype, notice = resolve_dtype(
            config.dtype, checkpoint.stored_dtype, device, str(checkpoint.text_config.get("model_type"))
        )
        return cls(
            config=pairing.calibrated(config),
            checkpoint=checkpoint,
            pairing=pairing,
            architecture=architecture,
            devices=devices,
            dtype=dtype,
            max_model_len=_max_model_len(config, checkpoint),
            notices=tuple(sentence for sentence in (notice, masked.notice) if sentence),
        )

    def tokenizer(self, fast: Any) -> Tokenizer:
        return Tokenizer.of(
            fast,
            max_model_len=self.max_model_len,
            vocab_size=self.checkpoint.vocab_size,
            lowercase=self.checkpoint.lowercase,
            pads=bool(self.checkpoint.config.get("pads_prompts")),
            token_types=int(self.checkpoint.text_config.get("type_vocab_size") or 2) > 1,
            leaves_out_prompts=self.checkpoint.leaves_out_prompts,
            late=self.checkpoint.late if self.architecture.kind == "multi_vector" else None,
        )

    def model(self, tokenizer: Tokenizer) -> Model:
        scorer = self.pairing.scorer
        token_ids: Seq[int] = self.config.pooler_config.returned_token_ids or ()
        if scorer:
            token_ids = scorer.token_ids or tokenizer.ids_of(scorer.words)
        loader = Loader(
            dtype=self.dtype,
            device=self.device,
            max_model_len=self.max_model_len,
            trust_remote_code=self.config.trust_remote_code,
        )
        return Model.load(loader, self.checkpoint, self.architecture, self.config, scorer, token_ids)


def _max_model_len(config: EngineConfig, checkpoint: Checkpoint) -> int:
    asked = config.max_model_len
    if asked is not None and asked > checkpoint.longest:
        raise ConfigError(
            f"--max-model-len {asked} is more than the {checkpoint.longest} tokens that this model has positions for."
        )
    return asked or checkpoint.max_model_len
