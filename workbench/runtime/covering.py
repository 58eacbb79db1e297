"""Steps that cover by design what an engine does: every bucket that it pads to, in every kind of step, a few times, in random order.

Random mixes visit most buckets hardly at all, and a bucket that no step fell into is guessed from its neighbours. Where nothing is
padded, sizes are powers of 2 instead.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from workbench.core import Request
from workbench.runtime.driver import Driver

Kind = Literal["decode", "serve", "finetune", "both", "evaluate", "train"]
STREAMS: tuple[tuple[Kind, ...], ...] = (
    ("finetune", "both", "evaluate"),
    ("serve",),
    ("decode",),
    ("train",),
)  # in turn, each at its own pace
BURST = 12  # steps of one stream in a row: a GPU's clocks follow the work, and decodes between backwards take longer than among themselves
TRAINS = 12  # whole passes, one right after another
SLICES = (None, 1, 4, None, 8, 2)  # backward layers at a time, over and over; None: all that are left
GROWTH, MIN_GROWTH = 64, 4  # tokens that a resident sequence grows by before another takes its place, at most and at least
LOADS = 4  # points that copy an adapter to the device


@dataclass(frozen=True)
class Point:
    """One kind of step, of `least` to `size` decode rows or packed tokens. `is_long`: at long contexts, `is_bare`: without adapters,
    `loads`: with an adapter to be copied to the device.
    """

    kind: Kind
    size: int
    least: int
    is_long: bool = False
    is_bare: bool = False
    loads: bool = False


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far the points reach: decode rows, tokens of a prompt and of a step, and of a context."""

    max_rows: int
    max_prompt_tokens: int
    max_tokens: int
    max_context: int


def points(driver: Driver, reach: Reach) -> list[Point]:
    """Every point once."""
    info, found = driver.info, []
    rows = _steps_up(info.decode_buckets, reach.max_rows)
    for least, most in rows:
        found += [Point("decode", most, least), Point("decode", most, least, is_long=True)]
    found += [Point("decode", most, least, is_bare=True) for least, most in rows[::3]]
    least, most = rows[len(rows) // 2]
    found += [Point("decode", most, least, loads=True)] * LOADS
    shape = next(iter(driver.shapes.values()))
    longest = shape.micro_batch(0).tokens
    for least, most in _steps_up(info.token_buckets, reach.max_tokens):
        found.append(Point("serve", most, least))
        found += [Point("finetune", min(most, longest), least)] if least <= longest else []
        found += [Point("both", most, least)] if most >= 3 else []
    if 0 < sum(m.tokens for m in shape.evaluation()[:1]) <= info.max_batch_tokens:
        found.append(Point("evaluate", 0, 0))
    return found + [Point("train", 0, 0)] * TRAINS


def _steps_up(buckets: Sequence[int], most: int) -> list[tuple[int, int]]:
    """(least, most) of each bucket, or of each power of 2 where there are none, up to `most`."""
    sizes = buckets or [2**k for k in range(most.bit_length() + 1)]
    ends = [min(size, most) for size in sizes[: 1 + sum(size < most for size in sizes)]]
    return [(last + 1, end) for last, end in zip((0, *ends), ends, strict=False)]


class Cover:
    """Collects one step after another on a driver; the same seed collects the same ones. `rounds` counts how often it has been through,
    `round` how often the last step's stream had.
    """

    def __init__(self, driver: Driver, reach: Reach, adapters: Sequence[str | None], job_ids: Sequence[str], seed: int) -> None:
        self.driver, self.reach, self.job_ids = driver, reach, job_ids
        self.draw = random.Random(seed)
        self.points = points(driver, reach)
        self.left: dict[tuple[Kind, ...], list[Point]] = {stream: [] for stream in STREAMS}
        self.done = dict.fromkeys(STREAMS, 0)
        self.sizes = {stream: sum(point.kind in stream for point in self.points) for stream in STREAMS}
        self.names = [name for name in adapters if name is not None]
        self.slices = dict.fromkeys(job_ids, 0)
        self.count = 0
        self.passing: list[str] = []
        self.stream, self.burst, self.round = STREAMS[0], 0, 0
        info, capacity = driver.info, driver.info.num_blocks * driver.info.block_tokens
        self.short = self.growth = max(MIN_GROWTH, min(GROWTH, info.max_model_len // 8, capacity // (16 * reach.max_rows)))
        # what the prompts of a step need is left free
        self.spare = min(8 + (reach.max_tokens + reach.max_prompt_tokens) // info.block_tokens, info.num_blocks // 2)
        self.pools: dict[tuple[bool, bool], list[str]] = {}

    @property
    def rounds(self) -> int:
        """How many times every point has been taken."""
        return min(self.done[stream] // self.sizes[stream] for stream in STREAMS if self.sizes[stream])

    # ---- residents

    def settle(self) -> int:
        """Collect what lets sequences decode (their first decode), for one step that is not measured; how many rows that is, 0 if none."""
        for pool in self.pools.values():
            for name in [n for n in pool if self._is_worn(n)]:
                self.driver.release(name)
                pool.remove(name)
        rows = self.reach.max_rows
        wanted = {(False, False): rows, (False, True): max(1, rows // 4), (True, False): rows}  # (is long, is bare): how many
        free, fresh = self._free_blocks() - self.spare, 0
        for key, number in wanted.items():
            pool = self.pools.setdefault(key, [])
            while len(pool) < number and fresh < rows:
                context = self._context(free, number - len(pool)) if key[0] else self.short
                needed = self._blocks(context + self.growth)
                if needed > (free if pool else len(self.driver.free_blocks)):
                    break
                adapter = None if key[1] or not self.names else self.names[len(pool) % len(self.names)]
                pool.append(self._begin(context, adapter))
                self.driver.decode(pool[-1:])
                free, fresh = free - needed, fresh + 1
        return fresh

    def _context(self, free: int, left: int) -> int:
        """Three quarters of the longest context for the first long sequences, less for later ones: `left` of them fit `free` blocks."""
        info = self.driver.info
        tokens = (free - left * self._blocks(self.short + self.growth)) * info.block_tokens
        return max(self.short, min(self.reach.max_context * 3 // 4, tokens // 16))

    def _free_blocks(self) -> int:
        """Blocks that no resident holds or will grow into."""
        runs = (self.driver.runs[name] for pool in self.pools.values() for name in pool)
        return len(self.driver.free_blocks) - sum(self._blocks(r.request.prompt_tokens + self.growth) - len(r.blocks) for r in runs)

    def _blocks(self, tokens: int) -> int:
        return -(-(tokens + 1) // self.driver.info.block_tokens)

    def _is_worn(self, name: str) -> bool:
        """Whether a resident has grown by `growth`, or is about to reach the model's context."""
        run = self.driver.runs[name]
        return run.length - run.request.prompt_tokens >= self.growth or run.length + 2 >= self.driver.info.max_model_len

    def _begin(self, tokens: int, adapter: str | None, assumed: int | None = None) -> str:
        """A request of `tokens` prompt tokens; all but the last of them (or `assumed`) are taken as computed."""
        self.count += 1
        name = f"cover-{self.count}"
        self.driver.add(Request(request_id=name, arrival_s=0.0, prompt_tokens=tokens, output_tokens=1, adapter=adapter))
        done = tokens - 1 if assumed is None else assumed
        if done:
            self.driver.assume(name, done)
        return name

    def clear(self) -> None:
        """Give every sequence back."""
        for name in list(self.driver.runs):
            self.driver.release(name)
        self.pools, self.passing = {}, []

    # ---- steps

    def collect(self) -> None:
        """The next step: of the stream that is furthest behind; a job whose forward is complete runs a slice of its backward first."""
        for name in self.passing:
            self.driver.release(name)
        self.passing = []
        if self.burst == 0:
            self.stream = min((s for s in STREAMS if self.sizes[s]), key=lambda s: self.done[s] / self.sizes[s])
            self.burst = BURST
        self.burst -= 1
        stream = self.stream
        self.round = self.done[stream] // self.sizes[stream]
        if not self.left[stream]:
            self.left[stream] = self.draw.sample(here := [p for p in self.points if p.kind in stream], len(here))
        if stream == STREAMS[0]:
            self._train(self.left[stream])
            return
        point = self.left[stream].pop(0)
        self.done[stream] += 1
        if stream == ("train",):
            self._pass_on()
            return
        size = self._size(point)
        if stream == ("decode",):
            self._decode(size, point.is_long, point.is_bare, loads=point.loads)
        else:
            rows = self._beside(size - 1)
            self._decode(rows)
            self._prefill(size - rows)

    def _size(self, point: Point) -> int:
        """A bucket's end as often as all the sizes below it."""
        return point.size if self.draw.random() < 0.5 else self.draw.randint(point.least, point.size)

    def _beside(self, most: int) -> int:
        """How many decodes run beside other work: none in a quarter of the steps, any number in a quarter, else log-uniform."""
        most = min(most, self.reach.max_rows)
        kind = self.draw.random()
        if most < 1 or kind < 0.25:
            return 0
        return self.draw.randint(1, most) if kind < 0.5 else max(1, round(most ** self.draw.random()))

    def _decode(self, rows: int, is_long: bool = False, is_bare: bool = False, *, loads: bool = False) -> None:
        pool = self.pools[is_long, is_bare]
        if loads and self.names:
            self.driver.unload(self.names[self.draw.randrange(min(rows, len(self.names)))])
        # few adapters or all: rows of those that are chosen come first
        some = self.names[: self.draw.randint(1, len(self.names))] if self.names and not loads else self.names
        chosen = sorted(pool, key=lambda name: self.driver.runs[name].request.adapter not in some) if not is_long else pool
        self.driver.decode(chosen[:rows])

    def _prefill(self, tokens: int) -> None:
        """Prompts of so many tokens in all: one or more, some behind a computed prefix, some not to their end."""
        longest = self.reach.max_prompt_tokens
        while tokens > 0:
            chunk = min(tokens, longest if self.draw.random() < 0.7 else self.draw.randint(1, longest))
            room = self.driver.info.max_model_len - 2 - chunk
            prefix = self.draw.randint(0, min(room, longest)) if self.draw.random() < 0.3 and not self.passing else 0
            more = min(room - prefix, 8) if self.draw.random() < 0.3 else 0
            adapter = self.draw.choice([None, *self.names])
            if self._blocks(prefix + chunk + more) > self._free_blocks():
                return  # a small KV pool holds no more
            name = self._begin(prefix + chunk + more, adapter, prefix)
            self.driver.prefill(name, chunk)
            self.passing.append(name)
            tokens -= chunk

    def _pass_on(self) -> None:
        """All that is left of the first job's forward, or else of its backward, and nothing beside it."""
        job_id = self.job_ids[0]
        state = self.driver.jobs[job_id]
        if state.layers_left:
            self.driver.backward(job_id)
        else:
            left = self.driver.shapes[job_id].micro_batch(state.index).tokens - state.offset
            self.driver.finetune(job_id, min(left, self.reach.max_tokens))

    def _train(self, waiting: list[Point]) -> None:
        """A slice of backward if the job has one to do; else the first point whose tokens its micro-batch still has."""
        driver = self.driver
        job_id = self.job_ids[0] if self.draw.random() < 0.7 else self.draw.choice(self.job_ids)
        state = driver.jobs[job_id]
        if state.layers_left:
            layers = SLICES[self.slices[job_id] % len(SLICES)]
            self.slices[job_id] += 1
            driver.backward(job_id, layers)
            self._decode(self._beside(self.reach.max_rows))
            return
        left = driver.shapes[job_id].micro_batch(state.index).tokens - state.offset
        for place, point in enumerate(waiting):
            if point.kind == "evaluate":
                if state.offset == 0 and job_id == self.job_ids[0]:
                    driver.evaluate(job_id)
                    self._took(waiting, place)
                    return
                continue
            size = self._size(point)
            rows = self._beside(size - 2)
            tokens = size - rows
            if point.kind == "both":
                tokens = min(left, max(1, round((tokens - 1) * self.draw.random())))
            if 1 <= tokens <= left:
                driver.finetune(job_id, tokens)
                self._prefill(size - rows - tokens)
                self._decode(rows)
                self._took(waiting, place)
                return
        driver.finetune(job_id, min(left, self.reach.max_tokens))  # nothing fits what is left: a point of its own

    def _took(self, waiting: list[Point], place: int) -> None:
        waiting.pop(place)
        self.done[STREAMS[0]] += 1
