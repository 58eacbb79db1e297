"""The terms of a step's duration: what a latency model has a cost for, with and without padding.

    duration = sum over terms of cost * term(work),  cost >= 0

Terms on the features as they are: one per step, the sums of `features.NAMES`, one per prompt, and a constant for each kind of work that
is present (its kernel launches) and for rows with adapters. An executor that pads runs a forward or a backward layer of a bucket, however
many tokens are in it, so that its duration is a step function, and not always a rising one: every bucket is a term of its own. Where
nothing is padded, a constant for a forward of whatever kind (the weights are read once) and hinges max(0, tokens - knee) on its packed
tokens and on the tokens of each backward layer let the cost of a token rise once a matrix product leaves the memory-bound regime.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.features import INDEX, NAMES

FORWARD_KNEES = (32, 64, 128, 256, 512, 1024)
BACKWARD_KNEES = (128, 256, 512, 1024)
PRESENT = ("finetune_tokens", "evaluate_tokens", "prefill_tokens", "decode_tokens", "backward_layers", "adapters")
TOKENS = ("finetune_tokens", "evaluate_tokens", "prefill_tokens", "decode_tokens")
FORWARD = "has a forward"
FORWARD_HINGE, BACKWARD_HINGE = "tokens above {}", "backward token-layers above {} tokens"
SERVING, TRAINING, DECODING, BACKWARD = "serving forward", "training forward", "decode", "backward layer"
PROMPTS = "prompts"  # requests that prefill: one decode is one token of one request
SEQUENCES = ("padded requests", "padded requests x prefill tokens")  # of a padded forward: its logits, and the grid of its attention
TABLES = (SERVING, TRAINING, DECODING, BACKWARD)
UNITS = {SERVING: "tokens", TRAINING: "tokens", DECODING: "rows", BACKWARD: "tokens"}
IN_TABLE = {  # terms that a bucket's cost holds already, beside the curve of its size: steps of the table have none of their own
    SERVING: ("has prefill_tokens",),
    TRAINING: ("has finetune_tokens",),
    DECODING: ("has decode_tokens",),
    BACKWARD: ("backward_layers", "backward_token_layers"),
}
CLASSES = ("backward", "finetune", "prefill", "decode")  # a step's class is the first of these kinds of work that it holds


@dataclass(frozen=True)
class Padding:
    """What an executor pads to, ascending (`ExecutorInfo.token_buckets` and its neighbours): tokens and requests of a forward, rows of a
    step that only decodes, tokens of a backward layer. Empty: nothing is padded.
    """

    forward: tuple[int, ...] = ()
    sequences: tuple[int, ...] = ()
    decode: tuple[int, ...] = ()
    backward: tuple[int, ...] = ()

    @classmethod
    def of(cls, info: Any) -> "Padding":
        """That of an `ExecutorInfo`."""
        return cls(info.token_buckets, info.sequence_buckets, info.decode_buckets, info.backward_buckets)

    def buckets(self, table: str) -> tuple[int, ...]:
        """The buckets of one of `TABLES`; training forwards (with rows of a job) and serving ones have the same."""
        return {SERVING: self.forward, TRAINING: self.forward, DECODING: self.decode, BACKWARD: self.backward}[table]


UNPADDED = Padding()


def table_terms(table: str, padding: Padding) -> list[str]:
    """The names of a table's terms, by bucket."""
    return [f"{table} of {bucket} {UNITS[table]}" for bucket in padding.buckets(table)]


def smooth_terms() -> tuple[str, ...]:
    """The terms that every model has, in the order of its costs; its tables follow."""
    hinges = [*map(FORWARD_HINGE.format, FORWARD_KNEES), *map(BACKWARD_HINGE.format, BACKWARD_KNEES)]
    return ("step", *NAMES, *(f"has {name}" for name in PRESENT), PROMPTS, *SEQUENCES, FORWARD, *hinges)


def term_names(padding: Padding = UNPADDED) -> tuple[str, ...]:
    """The model's terms, in the order of its costs."""
    return (*smooth_terms(), *(name for table in TABLES for name in table_terms(table, padding)))


def group_of(term: str) -> str:
    """The table that a term belongs to, or the term itself."""
    table = term.partition(" of ")[0]
    return table if table in TABLES else term


@dataclass(frozen=True)
class Places:
    """Where steps stand in the tables: per table the index of each step's bucket [n] (-1: not in this table), and sizes [n].

    `tokens` are a forward's packed tokens and `layer_tokens` the tokens of its backward layers, padded where `rounded`; `sequences`
    [n, len(SEQUENCES)] are the values of those terms.
    """

    index: dict[str, np.ndarray]
    tokens: np.ndarray
    layer_tokens: np.ndarray
    sequences: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, padding: Padding, *, rounded: bool) -> "Places":
        """Of steps given as features [n, len(NAMES)]."""
        trained, served = values[:, 0] + values[:, 1], values[:, 2]
        tokens = trained + served + values[:, 3]
        layers = values[:, INDEX["backward_layers"]]
        per_layer = np.divide(values[:, INDEX["backward_token_layers"]], layers, out=np.zeros_like(layers), where=layers > 0)
        decodes = (trained + served == 0) & (tokens > 0) & (tokens <= max(padding.decode, default=-1))
        mixed = (tokens > 0) & (tokens <= max(padding.forward, default=-1)) & ~decodes
        behind = (layers > 0) & (per_layer <= max(padding.backward, default=-1))
        chosen = {SERVING: mixed & (trained == 0), TRAINING: mixed & (trained > 0), DECODING: decodes, BACKWARD: behind}
        index, sequences = {}, np.zeros((len(values), len(SEQUENCES)))
        many, requests = np.append(padding.sequences, 0.0), values[:, INDEX["requests"]]
        sequences[:, 0] = np.where(mixed & (requests > 0), many[np.searchsorted(padding.sequences, requests)], 0.0)
        padded = np.append(padding.forward, 0.0)[np.searchsorted(padding.forward, tokens)]
        sequences[:, 1] = sequences[:, 0] * padded * (served > 0)
        for table in TABLES:
            sizes = per_layer if table == BACKWARD else tokens
            index[table] = np.where(chosen[table], np.searchsorted(padding.buckets(table), sizes), -1)
            if rounded and chosen[table].any():
                sizes[chosen[table]] = np.asarray(padding.buckets(table), float)[index[table][chosen[table]]]
        return cls(index, tokens, per_layer, sequences)


def smooth_design(values: np.ndarray, places: Places) -> np.ndarray:
    """The terms that every model has [n, smooth terms], hinges on the sizes of `places`, of steps given as features [n, len(NAMES)]."""
    tokens, layers = places.tokens, values[:, INDEX["backward_layers"]]
    columns = [np.ones(len(values)), *values.T]
    columns[1 + INDEX["backward_token_layers"]] = places.layer_tokens * layers
    columns += [(values[:, INDEX[name]] > 0).astype(float) for name in PRESENT]
    columns += [np.maximum(0.0, values[:, INDEX["requests"]] - values[:, INDEX["decode_tokens"]])]
    columns += [*places.sequences.T, (tokens > 0).astype(float)]
    columns += [np.maximum(0.0, tokens - knee) for knee in FORWARD_KNEES]
    columns += [np.maximum(0.0, (places.layer_tokens - knee) * layers) for knee in BACKWARD_KNEES]
    return np.column_stack(columns)


def table_design(values: np.ndarray, places: Places, padding: Padding) -> np.ndarray:
    """The tables' terms [n, buckets]: 1 for a step's own bucket, or its number of backward layers."""
    columns = [np.zeros((len(values), 0))]
    for table in TABLES:
        one_hot = places.index[table][:, None] == np.arange(len(padding.buckets(table)))
        columns.append(one_hot * (values[:, INDEX["backward_layers"], None] if table == BACKWARD else 1.0))
    return np.hstack(columns)


def design(values: np.ndarray, padding: Padding = UNPADDED) -> np.ndarray:
    """Terms [n, terms] of steps given as features [n, len(NAMES)]."""
    values = np.asarray(values, float)
    places = Places.of(values, padding, rounded=False)
    smooth = smooth_design(values, places)
    names = smooth_terms()
    forwards = slice(names.index(FORWARD), names.index(FORWARD) + 1 + len(FORWARD_KNEES))
    smooth[np.any([places.index[t] >= 0 for t in (SERVING, TRAINING, DECODING)], axis=0), forwards] = 0.0
    smooth[places.index[BACKWARD] >= 0, forwards.stop :] = 0.0
    for table, held in IN_TABLE.items():
        smooth[(places.index[table] >= 0)[:, None] & np.isin(names, held)] = 0.0
    return np.hstack([smooth, table_design(values, places, padding)])


def classes_of(values: np.ndarray) -> np.ndarray:
    """Each step's class as an index into `CLASSES` [n]: backward beats fine-tune (and evaluate) forward beats prefill beats decode."""
    trains = values[:, INDEX["finetune_tokens"]] + values[:, INDEX["evaluate_tokens"]] > 0
    return np.select([values[:, INDEX["backward_layers"]] > 0, trains, values[:, INDEX["prefill_tokens"]] > 0], [0, 1, 2], 3)
