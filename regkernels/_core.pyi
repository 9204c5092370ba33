"""The extension module. Private: its functions may change at any time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

__version__: str

_Spec = tuple[str, tuple[int, ...]]

class _Op(TypedDict):
    inputs: tuple[tuple[str, bool, str], ...]
    outputs: tuple[tuple[str, str], ...]
    attributes: tuple[tuple[str, str, tuple[str, ...]], ...]
    gradient: str | None  # the name of an op

def ops() -> dict[str, _Op]: ...
def infer(
    op: str,
    inputs: Sequence[_Spec | None],
    attributes: Mapping[str, Any],
    wanted: int,
    slab: Sequence[int] = (),
) -> list[_Spec | None]: ...
def launch(
    op: str,
    inputs: Sequence[_Spec | None],
    input_addresses: Sequence[int],
    attributes: Mapping[str, Any],
    wanted: int,
    outputs: Sequence[_Spec | None],
    output_addresses: Sequence[int],
    cuda_device: int,
    stream: int,
) -> None: ...

class TensorFramework:
    def __init__(
        self,
        exchange: object,
        types: tuple[type, ...],
        empty: Callable[..., Any],
        dtypes: Mapping[str, Any],
    ) -> None: ...

class TensorOp:
    def __init__(
        self, framework: TensorFramework, op: str, wanted: Sequence[int | None]
    ) -> None: ...
    def launch(
        self, operands: tuple[Any, ...], attributes: dict[str, Any], wanted: int
    ) -> list[Any] | None: ...
    def forward(
        self, operands: tuple[Any, ...], attributes: dict[str, Any], is_recording: bool
    ) -> tuple[tuple[bool, ...], list[Any]] | None: ...

def xla_registrations(platform: str) -> dict[str, object]: ...
def xla_ffi_api_version() -> tuple[int, int]: ...
def cuda_architectures() -> list[str]: ...
def cuda_device_count() -> int: ...
def num_threads() -> int: ...
