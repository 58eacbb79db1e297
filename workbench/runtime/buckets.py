"""What an engine with recorded graphs pads to, as `ExecutorInfo` tells a latency model."""

import torch

from workbench.runtime.backward_graphs import LONGEST
from workbench.runtime.graphs import ROW_BUCKETS, row_bucket
from workbench.runtime.inputs import TOKEN_BUCKETS
from workbench.runtime.mixed_graphs import sequence_bucket


def buckets(max_batch_tokens: int, max_requests: int, activation_tokens: int, dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
    """The bucket fields of `ExecutorInfo`, as `MixedGraphs`, `DecodeGraphs` and `BackwardGraphs` choose them."""
    most_rows = row_bucket(max_requests) or ROW_BUCKETS[-1]
    return {
        "sequence_buckets": tuple(sorted({sequence_bucket(1, max_requests), max_requests})),
        "token_buckets": (*(b for b in TOKEN_BUCKETS if b < max_batch_tokens), max_batch_tokens),
        "decode_buckets": tuple(b for b in ROW_BUCKETS if b <= most_rows),
        "backward_buckets": () if dtype == torch.float32 else tuple(b for b in (*TOKEN_BUCKETS, LONGEST) if b <= activation_tokens),
    }
