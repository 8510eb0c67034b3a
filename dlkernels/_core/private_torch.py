"""All names of torch that this package uses although torch does not promise to keep them.

Each has a line that says what it is for and which releases of torch have it: the tests run with 2.13, and torch 2.11,
the oldest release that the package supports, has the name as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack as without_innermost_transform
from torch._functorch.utils import unwrap_dead_wrappers
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.library import Library
from torch.nn.modules import module as module_hooks
from torch.onnx._internal.exporter import _decomp as onnx_decompositions

__all__ = [
    "HAS_ONEDNN",
    "FakeTensor",
    "FunctionalTensor",
    "add_batch_dim",
    "add_to_onnx_export",
    "are_transforms_active",
    "composite",
    "cpp_apply",
    "enter_vmap_level",
    "forward_ad",
    "get_unwrapped",
    "handles_of_tensors",
    "has_global_forward_hooks",
    "has_saved_tensors_hooks",
    "is_any_autocast_enabled",
    "is_batched_by_vmap",
    "is_dispatch_mode_active",
    "is_function_mode_active",
    "is_in_backward",
    "is_legacy_batched",
    "is_onednn_enabled",
    "is_profiling",
    "is_tracing",
    "is_wrapped",
    "jagged_dim",
    "jagged_longest",
    "leave_vmap_level",
    "level_of_transform",
    "level_of_wrapper",
    "nested_like",
    "onednn_takes_bf16",
    "onednn_takes_f16",
    "operator_names",
    "remove_batch_dim",
    "safe_softmax",
    "schema_of",
    "skip_in_dynamo",
    "strided_sizes",
    "tensors_of_handles",
    "unregister",
    "unwrap_dead_wrapper",
    "unwrap_dead_wrappers",
    "without_innermost_transform",
]

# Imported above. `forward_ad._current_level`: at least 0 inside of forward-mode differentiation (2.11, 2.13).
# `forward_ad._set_fwd_grad_enabled`: a context that turns forward mode on or off (2.11, 2.13).
# `FakeTensor`, `FunctionalTensor`: the subclasses of Tensor that stand for plain tensors in a trace (2.11, 2.13).
# `unwrap_dead_wrappers`: takes tensors out of wrappers that a finished torch.func transform left behind (2.11, 2.13).
# `without_innermost_transform`: a context in which the innermost torch.func transform does not run (2.11, 2.13).

# `unwrap_dead_wrappers` for one tensor (2.11, 2.13).
unwrap_dead_wrapper: Callable[[Any], Any] = torch._C._functorch.unwrap_if_dead
# Whether a transform of torch.func runs (2.11, 2.13).
are_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
# Whether a tensor is the wrapper of a torch.func transform, whether it is one of vmap, the level of its transform (-2
# if it is none), and the tensor in it (2.11, 2.13).
is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
is_batched_by_vmap: Callable[[Tensor], bool] = torch._C._functorch.is_batchedtensor
level_of_wrapper: Callable[[Tensor], int] = torch._C._functorch.maybe_get_level
get_unwrapped: Callable[[Tensor], Tensor] = torch._C._functorch.get_unwrapped
# The level of the innermost transform that runs; an error if none does (2.11, 2.13).
level_of_transform: Callable[[], int] = torch._C._functorch.current_level
# Whether torch.jit.trace records (2.11, 2.13).
is_tracing: Callable[[], bool] = torch._C._is_tracing
# Whether autocast is on for any device, in one call (2.11, 2.13).
is_any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled
# How many dispatch modes of Python are active, and whether a function mode is (2.11, 2.13).
is_dispatch_mode_active: Callable[[], int] = torch._C._len_torch_dispatch_stack
is_function_mode_active: Callable[[], bool] = torch._C._is_torch_function_mode_enabled
# Whether a profiler records operators (2.11, 2.13).
is_profiling: Callable[[], bool] = torch._C._autograd._profiler_enabled
# From a list of tensors to a list of capsules with handles of torch's C shim, which the caller owns, and back; the
# second takes the handles over (2.11, 2.13).
handles_of_tensors: Callable[[list[Tensor]], list[Any]] = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors
tensors_of_handles: Callable[[list[Any]], list[Tensor]] = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs
# The names of all operators that are registered, of this package and of others (2.11, 2.13).
operator_names: Callable[[], list[str]] = torch._C._dispatch_get_all_op_names
# Whether a tensor is batched by the legacy vmap, which preceded torch.func (2.11, 2.13).
is_legacy_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
# Enter and leave a level of the legacy vmap; entering returns the new number of levels (2.11, 2.13).
enter_vmap_level: Callable[[], int] = torch._C._vmapmode_increment_nesting
leave_vmap_level: Callable[[], int] = torch._C._vmapmode_decrement_nesting
# Wrap and unwrap a tensor of the legacy vmap (2.11, 2.13).
add_batch_dim: Callable[..., Tensor] = torch._add_batch_dim
remove_batch_dim: Callable[..., Tensor] = torch._remove_batch_dim
# Whether torch was built with oneDNN, which runs its LSTM on the CPU (2.11, 2.13).
HAS_ONEDNN = bool(torch._C._has_mkldnn)
# Softmax with zeros where every score is -inf (2.11, 2.13).
safe_softmax: Callable[..., Tensor] = torch._safe_softmax
# Whether oneDNN is enabled, see `torch.backends.mkldnn` (2.11, 2.13).
is_onednn_enabled: Callable[[], bool] = torch._C._get_mkldnn_enabled


def onednn_takes_bf16() -> bool:
    """Whether oneDNN computes in bfloat16 on this processor (2.11, 2.13)."""
    return HAS_ONEDNN and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def onednn_takes_f16() -> bool:
    """Whether oneDNN computes in float16 on this processor (2.11, 2.13)."""
    return HAS_ONEDNN and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def add_to_onnx_export(decompositions: Mapping[Any, Callable[..., Any]]) -> None:
    """Tells torch.onnx.export what operators consist of that have no translation of their own.

    The exporter looks in torch's global table of decompositions too, but there an operator would change other programs:
    FakeTensorMode traces the decomposition instead of calling the registered fake, and Inductor refuses to call an
    operator that stands there if the environment has the variable CI, as machines of continuous integration do. So the
    entries are added to the exporter's own table, whenever it makes one (2.11, 2.13).
    """
    module: Any = onnx_decompositions
    make_table = module.create_onnx_friendly_decomposition_table

    @wraps(make_table)
    def make_table_with_ours(translated: set[Any]) -> dict[Any, Callable[..., Any]]:
        ours = {overload: one for overload, one in decompositions.items() if overload not in translated}
        return {**make_table(translated), **ours}

    module.create_onnx_friendly_decomposition_table = make_table_with_ours


def schema_of(overload: Any) -> Any:
    """The schema of an operator's overload, which has `arguments` (2.11, 2.13)."""
    return overload._schema


def composite(overload: Any) -> Callable[..., Any]:
    """torch's own implementation of an operator that consists of others, whatever is registered for it. `decompose`
    would prefer a decomposition in Python, which is for tracing and draws other dropout masks (2.11, 2.13)."""
    return partial(overload._op_dk, torch._C.DispatchKey.CompositeImplicitAutograd)


def cpp_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The C++ `apply` of a Function. It costs a fifth of Function.apply, which also serves functorch and binds default
    arguments (2.11, 2.13)."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc, no-any-return]


def unregister(library: Library) -> None:
    """Takes the kernels of a library out of the dispatcher again (2.11, 2.13)."""
    library._destroy()  # type: ignore[no-untyped-call]


def is_in_backward() -> bool:
    """Whether this thread runs a backward (2.11, 2.13)."""
    return torch._C._current_graph_task_id() != -1


def has_saved_tensors_hooks() -> bool:
    """Whether hooks on saved tensors are in force, as torch.utils.checkpoint sets them (2.11, 2.13)."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def skip_in_dynamo(function: Callable[..., Any]) -> None:
    """Dynamo runs this function as it is, wherever a compiled program calls it (2.11, 2.13)."""
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))


def has_global_forward_hooks() -> bool:
    """Whether hooks for the forward of all modules are registered (2.11, 2.13)."""
    return bool(module_hooks._global_forward_pre_hooks or module_hooks._global_forward_hooks)


def jagged_dim(nested: Any) -> int:
    """Which dimension of a jagged tensor is the ragged one (2.11, 2.13)."""
    return int(nested._ragged_idx)


def jagged_longest(nested: Any) -> int:
    """The length of the longest sequence of a jagged tensor (2.11, 2.13)."""
    return nested._get_max_seqlen()  # type: ignore[no-any-return]


def strided_sizes(nested: Any) -> Tensor:
    """The sizes of the parts of a strided nested tensor, [B, dimensions] on the CPU (2.11, 2.13)."""
    return nested._nested_tensor_size()  # type: ignore[no-any-return]


def nested_like(buffer: Tensor, like: Any) -> Tensor:
    """A strided nested tensor over `buffer` with the sizes, strides and offsets of `like` (2.11, 2.13)."""
    return torch._nested_view_from_buffer(
        buffer, like._nested_tensor_size(), like._nested_tensor_strides(), like._nested_tensor_storage_offsets()
    )
