"""Fine-tune data: examples become documents, documents rows, rows micro-batches; and they survive a checkpoint."""

import json
import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.config import FinetuneJob, RandomTokens
from workbench.core import Request
from workbench.data import PREFIX_TOKENS, prepare, prompt_token_ids, save_prepared

EOS = 2


class Letters:
    """A tokenizer of one token a character (ids from 10), with a beginning-of-text token 1 and a chat template `<role>content;`."""

    chat_template = "given"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": ([1] if add_special_tokens else []) + [10 + ord(c) for c in text]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        text = "".join(f"<{m['role'][0]}>{m['content']};" for m in messages)
        return text + ("<a>" if add_generation_prompt else "")


def job(data, **options):
    return FinetuneJob(adapter="a", data=data, **({"epochs": 1, "batch_size": 1} | options))


def prepared(data, **options):
    return prepare(job(data, **options), tokenizer=Letters(), vocab_size=300, eos_token_id=EOS)


def text_of(ids):
    return "".join(chr(t - 10) if t >= 10 else f"[{t}]" for t in ids if t is not None)


def test_a_text_example_learns_every_token_and_the_end():
    (document,) = prepared([{"text": "abc"}]).documents(0)
    assert text_of(document.token_ids) == "[1]abc[2]"
    assert document.labels == (*document.token_ids[1:], None)


def test_completion_only_takes_loss_on_the_completion_and_its_end():
    example = [{"prompt": "2+2=", "completion": "4!"}]
    (document,) = prepared(example, completion_only=True).documents(0)
    assert text_of(document.token_ids) == "[1]2+2=4![2]"
    assert text_of(document.labels) == "4![2]"
    # The label of a position is the token after it: the prompt's last token predicts the completion's first.
    assert document.labels[4] == document.token_ids[5]
    (whole,) = prepared(example).documents(0)
    assert whole.token_ids == document.token_ids
    assert text_of(whole.labels) == "2+2=4![2]"


def test_chat_loss_falls_on_the_assistants_turns_alone():
    messages = [{"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yo"), ("user", "so"), ("assistant", "ok"))]
    (document,) = prepared([{"messages": messages}], completion_only=True).documents(0)
    assert text_of(document.token_ids) == "<u>hi;<a>yo;<u>so;<a>ok;"
    assert text_of(document.labels) == "yo;ok;"


def test_a_jsonl_file_equals_the_same_examples_in_a_list(tmp_path):
    examples = [{"text": "one"}, {"prompt": "a", "completion": "ü"}, [3, 4, 5]]
    path = tmp_path / "data.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(e, ensure_ascii=False) for e in examples) + "\n", encoding="utf-8")
    assert prepared(path).rows == prepared(examples).rows
    assert prepared(str(path)).rows == prepared(examples).rows


def test_random_tokens_are_seeded_and_label_every_token():
    first, again = (prepared(RandomTokens(examples=4, tokens=16, seed=3)) for _ in range(2))
    assert first.rows == again.rows != prepared(RandomTokens(examples=4, tokens=16, seed=4)).rows
    assert first.micro_batch(0).labelled == 15
    assert all(0 <= t < 300 for row in first.rows for d in row for t in d.token_ids)


def test_packing_fills_rows_up_to_max_tokens_and_keeps_documents_apart():
    data = [[5] * n for n in (4, 3, 2, 6, 8, 1 + 1)]
    result = prepared(data, pack=True, max_tokens=8, steps=3, epochs=None)
    assert [tuple(len(d) for d in row) for row in result.rows] == [(4, 3), (2, 6), (8,), (2,)]
    assert all(d.labels[-1] is None for row in result.rows for d in row)


def test_an_epoch_visits_every_example_once_and_epochs_differ_in_order():
    data = [[i, i] for i in range(10)]
    result = prepared(data, epochs=2, batch_size=3, accumulation=2, seed=7)
    seen = [d.token_ids[0] for i in range(result.num_micro_batches) for d in result.documents(i)]
    assert result.num_micro_batches == 7
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert seen == [d.token_ids[0] for i in range(7) for d in prepared(data, epochs=2, batch_size=3, seed=7).documents(i)]
    assert seen != [d.token_ids[0] for i in range(7) for d in prepared(data, epochs=2, batch_size=3, seed=8).documents(i)]


def test_steps_count_optimiser_steps_and_repeat_the_data():
    result = prepared([[1, 2], [3, 4], [5, 6]], steps=4, epochs=None, batch_size=2, accumulation=3)
    assert result.num_micro_batches == 12
    assert all(len(result.documents(i)) == 2 for i in range(12))
    assert sum(result.micro_batch(i).ends_window for i in range(12)) == 4
    assert Counter(d.token_ids for i in range(12) for d in result.documents(i)) == {(1, 2): 8, (3, 4): 8, (5, 6): 8}


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=12),
    batch_size=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    epochs=st.integers(1, 3),
    pack=st.booleans(),
)
def test_sizes_agree_with_documents_and_windows_sum_their_labels(lengths, batch_size, accumulation, epochs, pack):
    result = prepared([[5] * n for n in lengths], batch_size=batch_size, accumulation=accumulation, epochs=epochs, pack=pack, max_tokens=10)
    window, tokens = [], 0
    for i in range(result.num_micro_batches):
        sizes, documents = result.micro_batch(i), result.documents(i)
        assert sizes.documents == tuple(len(d) for d in documents)
        assert sizes.labelled == sum(d.labelled for d in documents)
        window.append(sizes)
        tokens += sizes.tokens
        if sizes.ends_window:
            assert {m.window_labelled for m in window} == {sum(m.labelled for m in window)}
            assert len(window) == accumulation or i == result.num_micro_batches - 1
            window = []
    assert window == []
    assert tokens == epochs * sum(lengths)


def test_evaluation_is_due_at_multiples_of_evaluate_every_and_at_the_end():
    result = prepared([[1, 2]] * 10, accumulation=2, evaluation=[[1, 2, 3]] * 3, evaluate_every=2, batch_size=1)
    assert [i for i in range(10) if result.evaluates_after(i)] == [3, 7, 9]
    assert [m.documents for m in result.evaluation()] == [(3,), (3,), (3,)]
    assert {m.window_labelled for m in result.evaluation()} == {6}
    only_end = prepared([[1, 2]] * 4, evaluation=[[1, 2, 3]])
    assert [i for i in range(4) if only_end.evaluates_after(i)] == [3]
    nothing = prepared([[1, 2]] * 4)
    assert not nothing.evaluation()
    assert not any(nothing.evaluates_after(i) for i in range(4))


def test_a_checkpoint_carries_the_job_and_its_data(tmp_path):
    original = job(
        [{"prompt": "ab", "completion": "cd"}, {"prompt": "x", "completion": "y"}],
        completion_only=True,
        evaluation=[{"prompt": "e", "completion": "f"}],
        pack=True,
        epochs=5,
        seed=11,
        targets=("q_proj", "down_proj"),
    )
    before = prepare(original, tokenizer=Letters(), vocab_size=300, eos_token_id=EOS)
    save_prepared(tmp_path / "ck", original, before, micro_batches_done=3)
    resumed = FinetuneJob.from_checkpoint(tmp_path / "ck")
    after = prepare(resumed, vocab_size=300)
    assert after.first_micro_batch == 3
    assert (after.rows, after.evaluation_rows) == (before.rows, before.evaluation_rows)
    assert [after.documents(i) for i in range(5)] == [before.documents(i) for i in range(5)]
    kept = {name: getattr(resumed, name) for name in ("adapter", "targets", "betas", "seed", "epochs", "completion_only", "id")}
    assert kept == {name: getattr(original, name) for name in kept}
    # A checkpoint of the resumed job is as good as the first one.
    save_prepared(tmp_path / "again", resumed, after, micro_batches_done=4)
    assert prepare(FinetuneJob.from_checkpoint(tmp_path / "again"), vocab_size=300).rows == before.rows


def request(**options):
    return Request(**({"request_id": "r", "arrival_s": 0.0, "prompt_tokens": 8, "output_tokens": 1} | options))


def test_prompt_ids_depend_on_the_request_id_alone():
    ids = prompt_token_ids(request(), vocab_size=128)
    assert len(ids) == 8
    assert all(64 <= t < 128 for t in ids)
    assert ids == prompt_token_ids(request(arrival_s=9.0, adapter="x"), vocab_size=128)
    assert ids != prompt_token_ids(request(request_id="s"), vocab_size=128)
    assert min(prompt_token_ids(request(prompt_tokens=2000), vocab_size=50_000)) >= 1000


def test_equal_prefix_ids_give_equal_leading_tokens():
    a = prompt_token_ids(request(request_id="a", prompt_tokens=1200, prefix_ids=(7, 8)), vocab_size=500)
    b = prompt_token_ids(request(request_id="b", prompt_tokens=1100, prefix_ids=(7, 9)), vocab_size=500)
    assert (len(a), len(b)) == (1200, 1100)
    assert a[:PREFIX_TOKENS] == b[:PREFIX_TOKENS]
    assert a[PREFIX_TOKENS : 2 * PREFIX_TOKENS] != b[PREFIX_TOKENS : 2 * PREFIX_TOKENS]
    assert a[1024:1100] != b[1024:1100]
    short = prompt_token_ids(request(prompt_tokens=100, prefix_ids=(7,)), vocab_size=500)
    assert short == a[:100]


def test_given_ids_and_text_win_over_drawn_ids():
    assert prompt_token_ids(request(prompt_token_ids=(5, 6)), vocab_size=128) == (5, 6)
    assert prompt_token_ids(request(prompt="hi"), vocab_size=300, tokenizer=Letters()) == (1, 114, 115)


class Thinking(Letters):
    """Renders an assistant's turn longer while it is the last one, as some reasoning templates do."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        text = super().apply_chat_template(messages, tokenize, add_generation_prompt)
        return text + ("" if add_generation_prompt else "(thought)") if messages and messages[-1]["role"] == "assistant" else text


class NoTemplate(Letters):
    chat_template = None


TALK = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]
BAD_DATA = {
    "empty list": ([], {}, "data must hold at least one example, got none from a list"),
    "one dict": ({"text": "x"}, {}, "data must be a JSONL path.* Put a single example in a list"),
    "a number": (3, {}, "data must be a JSONL path"),
    "empty evaluation": ([[1, 2]], {"evaluation": []}, "evaluation must hold at least one example"),
    "unknown keys": ([{"instruction": "x", "output": "y"}], {}, r"example 0: .* got the keys \['instruction', 'output'\]"),
    "no prompt": ([{"completion": "x"}], {}, r"example 0: .* got the keys \['completion'\]"),
    "two shapes": ([{"text": "x", "messages": TALK}], {}, "example 0: an example must be exactly one of"),
    "text not a string": ([{"text": "a"}, {"text": 5}], {}, 'example 1: "text" must be a string, got 5'),
    "a bare string": (["text"], {}, "example 0: an example must be .* got 'text'"),
    "negative id": ([[1, -1]], {}, "example 0: a token id must be an integer in 0..299"),
    "id beyond the vocabulary": ([[1, 300]], {}, r"example 0: a token id must .* got 300"),
    "fraction id": ([[1, 2.5]], {}, "example 0: a token id must be an integer"),
    "too long": ([[1, 2], [1] * 9], {"max_tokens": 8}, "example 1: .* max_tokens=8 tokens, got 9. Raise the job's max_tokens, or cut"),
    "one token": ([[1]], {}, "example 0: .* at least one token to learn .* got 1 tokens"),
    "empty messages": ([{"messages": []}], {}, 'example 0: "messages" must be a non-empty list'),
    "message without content": ([{"messages": [{"role": "user"}]}], {}, 'example 0: every message needs a string "role" and "content"'),
    "no assistant": ([{"messages": TALK[:1]}], {"completion_only": True}, "example 0: .*, in a completion.* none to learn"),
    "text, completions asked": ([{"text": "x"}], {"completion_only": True}, "example 0: completion_only needs prompt/completion"),
    "ids, completions asked": ([[1, 2]], {"completion_only": True}, "example 0: completion_only needs .* got token ids"),
    "random, completions asked": (RandomTokens(), {"completion_only": True}, "completion_only needs .* got RandomTokens"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_an_error_that_names_the_example_and_the_next_step(case):
    data, options, message = BAD_DATA[case]
    with pytest.raises(ValueError, match=message):
        prepared(data, **options)


BAD_LINES = {
    "not JSON": ('{"text": "ok"}\n{"text": \n', "data.jsonl line 2: every line must be one JSON object"),
    "missing keys": ('{"text": "ok"}\n\n{"txt": "x"}\n', r"data.jsonl line 3: .* got the keys \['txt'\]"),
    "a JSON string": ('"hello"\n', "data.jsonl line 1: an example must be"),
    "empty file": ("\n \n", "data must hold at least one example, got none from '.*data.jsonl'"),
    "too long": ('{"text": "' + "x" * 99 + '"}\n', "data.jsonl line 1: .* max_tokens=32 tokens, got 101"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_an_error_with_its_number(case, tmp_path):
    text, message = BAD_LINES[case]
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path / "data.jsonl", max_tokens=32)


def test_a_file_in_another_encoding_is_an_error_with_its_line(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match=r"line 2: .* UTF-8"):
        prepared(tmp_path / "data.jsonl")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data must name a JSONL file, got '.*nowhere.jsonl'"):
        prepared(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("example", [{"text": "x"}, {"prompt": "x", "completion": "y"}, {"messages": TALK}])
def test_text_without_a_tokenizer_says_what_to_do(example):
    with pytest.raises(ValueError, match=r"example 0: text needs a tokenizer.*tokenizer.json, or pass sequences of token ids"):
        prepare(job([example]), vocab_size=300)
    with pytest.raises(ValueError, match="r: a text prompt needs a tokenizer"):
        prompt_token_ids(request(prompt="hi"), vocab_size=300)


def test_chat_without_a_template_and_unstable_templates_are_refused():
    with pytest.raises(ValueError, match="messages need a tokenizer with a chat template"):
        prepare(job([{"messages": TALK}]), tokenizer=NoTemplate(), vocab_size=300)
    with pytest.raises(ValueError, match="renders a turn the same whatever follows, but message 1 changes"):
        prepare(job([{"messages": TALK * 2}], completion_only=True), tokenizer=Thinking(), vocab_size=300)


def test_a_tokenizer_larger_than_the_model_is_refused():
    with pytest.raises(ValueError, match="token ids must be below the model's vocabulary of 100, got 1"):
        prepare(job([{"text": "zz"}]), tokenizer=Letters(), vocab_size=100)
    with pytest.raises(ValueError, match=r"r: prompt token ids must lie in 0..99"):
        prompt_token_ids(request(prompt_token_ids=(100,)), vocab_size=100)


@pytest.fixture
def checkpoint(tmp_path):
    original = job([[1, 2], [3, 299]])
    save_prepared(tmp_path, original, prepare(original, vocab_size=300), micro_batches_done=1)
    return tmp_path


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a checkpoint folder must hold job.json"):
        FinetuneJob.from_checkpoint(tmp_path)


def test_a_checkpoint_of_another_vocabulary_is_refused(checkpoint):
    with pytest.raises(ValueError, match="token ids must be below the model's vocabulary of 200, got 299"):
        prepare(FinetuneJob.from_checkpoint(checkpoint), vocab_size=200)


def test_a_checkpoint_beyond_the_jobs_end_is_refused(checkpoint):
    record = json.loads((checkpoint / "job.json").read_text())
    (checkpoint / "job.json").write_text(json.dumps(record | {"micro_batches_done": 2}))
    resumed = replace(FinetuneJob.from_checkpoint(checkpoint), batch_size=2)
    with pytest.raises(ValueError, match=r"micro_batches_done must be at most 1 .* got 2"):
        prepare(resumed, vocab_size=300)


def test_damaged_checkpoint_files_are_refused(checkpoint):
    resumed = FinetuneJob.from_checkpoint(checkpoint)
    (checkpoint / "data.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="must hold a checkpoint's documents"):
        prepare(resumed, vocab_size=300)
    (checkpoint / "data.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold data.safetensors"):
        prepare(resumed, vocab_size=300)
    record = json.loads((checkpoint / "job.json").read_text())
    record["job"]["lerning_rate"] = 1
    (checkpoint / "job.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="must be one of FinetuneJob's, got 'lerning_rate'"):
        FinetuneJob.from_checkpoint(checkpoint)
    (checkpoint / "job.json").write_text("{")
    with pytest.raises(ValueError, match="must be a job record of format 1"):
        FinetuneJob.from_checkpoint(checkpoint)


def test_micro_batches_beyond_the_end_do_not_exist():
    result = prepared([[1, 2]], evaluation=[[1, 2]])
    for call in (result.documents, result.micro_batch, result.evaluates_after, result.evaluation_documents):
        for index in (-1, 1):
            with pytest.raises(IndexError, match=f"must lie in 0..0, got {index}"):
                call(index)


def test_numpy_token_ids_are_token_ids():
    assert prepared([np.array([3, 4, 5])]).documents(0)[0].token_ids == (3, 4, 5)


def test_a_prepared_job_travels_to_another_process():
    result = prepared([[1, 2, 3]] * 5, accumulation=2, evaluation=[[1, 2]])
    result.micro_batch(0)
    copy = pickle.loads(pickle.dumps(result))
    assert copy == result
    assert [copy.micro_batch(i) for i in range(5)] == [result.micro_batch(i) for i in range(5)]
