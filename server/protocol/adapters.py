"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter."""

from __future__ import annotations

from msgspec import Struct

from carpool.server.decoding import RequestDecoder
from carpool.server.errors import InvalidRequest

MAX_NAME = 256  # characters


class LoadAdapterRequest(Struct, kw_only=True, gc=False):
    lora_name: str
    lora_path: str
    load_inplace: bool = False  # in place of one of that name
    is_3d_lora_weight: bool = False  # refused

    def check(self) -> None:
        if not self.lora_name or not self.lora_path:
            raise InvalidRequest("Both 'lora_name' and 'lora_path' must be provided.")
        # The log, /v1/models and a terminal show both.
        if len(self.lora_name) > MAX_NAME or not self.lora_name.isprintable():
            raise InvalidRequest(f"lora_name must be at most {MAX_NAME} printable characters.", "lora_name")
        if not self.lora_path.isprintable():
            raise InvalidRequest("lora_path must be printable characters.", "lora_path")
        if self.is_3d_lora_weight:
            raise InvalidRequest(
                "Weights of experts in three dimensions are not served in adapters.", "is_3d_lora_weight"
            )


class UnloadAdapterRequest(Struct, kw_only=True, gc=False):
    lora_name: str
    lora_int_id: int | None = None  # adapters go by their names

    def check(self) -> None:
        if not self.lora_name:
            raise InvalidRequest("'lora_name' needs to be provided to unload a LoRA adapter.", "lora_name")


decode_load_adapter_request = RequestDecoder(LoadAdapterRequest)
decode_unload_adapter_request = RequestDecoder(UnloadAdapterRequest)
