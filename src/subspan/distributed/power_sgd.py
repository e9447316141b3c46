"""torch's PowerSGD, to compare with."""

from __future__ import annotations

from typing import Any

from torch.nn.parallel import DistributedDataParallel

from subspan.distributed.traffic import Traffic


def power_sgd(ddp: DistributedDataParallel, rank: int, **settings: Any) -> Traffic:
    """Let DDP reduce rank-r factors of each gradient, P = GQ and GᵀP, and train with P(GᵀP)ᵀ: torch's PowerSGD hook.

    It approximates gradients and feeds the error back, for any optimizer; `compress_gradients` approximates nothing
    beyond the projection that its optimizer makes anyway. (m + n)·r numbers a step for each matrix, whole gradients for
    vectors, where that is no less than half of the matrix, and in the first ``start_powerSGD_iter`` steps.

    Args:
        ddp: the wrapped model, without a communication hook.
        rank: of the factors.
        **settings: of torch's ``PowerSGDState``, such as ``start_powerSGD_iter``, ``min_compression_rate`` and
            ``use_error_feedback``, with its defaults. It needs numpy.

    Returns:
        The count of bytes.

    Raises:
        ValueError: settings that torch refuses.

    Example:
        >>> def after_wrapping(ddp):  # in each process
        ...     traffic = power_sgd(ddp, rank=8, start_powerSGD_iter=10)

    Source: arXiv 1905.13727.
    """
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torch_power_sgd

    if rank < 1:
        raise ValueError(f"rank={rank} is not allowed; it must be an integer >= 1")
    state = torch_power_sgd.PowerSGDState(ddp.process_group, matrix_approximation_rank=rank, **settings)
    traffic = Traffic()

    def reduce(state: Any, bucket):  # type: ignore[no-untyped-def]  # DDP looks at the annotations themselves
        compressed = state.iter >= state.start_powerSGD_iter
        before, itemsize = state.total_numel_after_compression, bucket.buffer().itemsize
        if not compressed:
            traffic.count("dense", bucket.buffer())
        future = torch_power_sgd.powerSGD_hook(state, bucket)
        if compressed:
            numbers = state.total_numel_after_compression - before
            factors = state.p_memory_dict[bucket.index()].numel() + state.q_memory_dict[bucket.index()].numel()
            traffic.count("projected", factors * itemsize)
            traffic.count("dense", (numbers - factors) * itemsize)
        if bucket.buffer().device.type == "cpu":
            # Its later all-reduces start in threads of the backend there, for several buckets in any order, and the
            # processes would mix them up. On a device they are queued at once.
            future.wait()
        return future

    ddp.register_comm_hook(state, reduce)
    return traffic
