"""The twelve defects of the released Loquetier, each as a small mutation of our own code and the test that it must turn red.

`old` occurs exactly once in `file`; a mutation that no longer applies fails its test, so the table cannot fall behind the code.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """Put `new` in the place of `old` in `file`, and `test` (a pytest node id) must fail. `defect` is its number in the release."""

    defect: int
    claim: str
    file: str
    old: str
    new: str
    test: str

    @property
    def id(self) -> str:
        return f"{self.defect:02d}-" + self.test.split("::")[-1].split("[")[0].removeprefix("test_")


ENGINE = "workbench/runtime/engine.py"
FORWARD = "workbench/runtime/forward.py"
BACKWARD = "workbench/runtime/backward.py"
FINETUNE = "workbench/runtime/finetune.py"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        defect=1,
        claim="The backward reads the fused weights in the layout that the forward has.",
        file=BACKWARD,
        old="torch.cat((d_qk, d_v), dim=1).flatten(1)",
        new="torch.cat((d_v, d_qk), dim=1).flatten(1)",
        test="tests/runtime/test_finetune.py::test_gradients_equal_peft_with_forward_and_backward_cut_anywhere_beside_decodes",
    ),
    Mutation(
        defect=2,
        claim="A prefill beside fine-tune rows takes its first token from its own last row.",
        file="workbench/runtime/inputs.py",
        old="samples.append(len(token_ids) - 1)",
        new="samples.append(len(token_ids) - 1 - step.num_train_rows)",
        test="tests/runtime/test_mixed_batch.py::test_first_token_of_a_prefill_beside_finetune_rows_comes_from_its_own_last_row",
    ),
    Mutation(
        defect=3,
        claim="Gradients are zeroed between optimiser steps.",
        file=FINETUNE,
        old="        self.gradients.zero_()",
        new="",
        test="tests/runtime/test_finetune.py::test_gradients_are_zeroed_between_optimiser_steps",
    ),
    Mutation(
        defect=4,
        claim="A saved adapter is its own PEFT directory with unscaled B.",
        file="workbench/runtime/adapters.py",
        old="tensor.detach().cpu().contiguous()\n        for key",
        new="(tensor * (weights.scales[key] if letter == 'B' else 1)).detach().cpu().contiguous()\n        for key",
        test="tests/runtime/test_adapters.py::test_a_saved_adapter_is_a_peft_directory_with_equal_logits_and_unscaled_b",
    ),
    Mutation(
        defect=5,
        claim="An adapter that is taken off a view and put on again computes as before.",
        file="workbench/runtime/virtual.py",
        old="nn.Parameter(found.to(device, copy=True),",
        new="nn.Parameter(torch.zeros_like(found, device=device),",
        test="tests/runtime/test_virtual.py::test_detach_carry_attach_gives_bit_equal_outputs",
    ),
    Mutation(
        defect=6,
        claim="Small updates of bf16 adapters are not lost: master weights and AdamW's state are fp32.",
        file=FINETUNE,
        old="(torch.zeros(layout.size, dtype=torch.float32, device=device) for _ in range(2))",
        new="(torch.zeros(layout.size, dtype=dtype, device=device) for _ in range(2))",
        test="tests/runtime/test_engine.py::test_small_bf16_updates_are_not_lost",
    ),
    Mutation(
        defect=7,
        claim="A request that ends gives back its KV blocks.",
        file="workbench/loop/ledger.py",
        old="        self.free(s)\n        s.phase = phase",
        new="        s.phase = phase",
        test="tests/test_replay.py::test_in_use_is_zero_after_every_replay_and_the_counts_in_steps_are_plain",
    ),
    Mutation(
        defect=8,
        claim="An unknown adapter is an error, never another adapter.",
        file=ENGINE,
        old="            self._known(request.adapter)\n",
        new="            request = replace(request, adapter=request.adapter if request.adapter in self._current else min(self._current))\n",
        test="tests/runtime/test_engine.py::test_unknown_adapter_is_an_error_with_a_suggestion",
    ),
    Mutation(
        defect=8,
        claim="An adapter loaded while others serve is served from then on.",
        file="workbench/runtime/engine_adapters.py",
        old="        self._current[weights.name] = version\n",
        new="        self._current.setdefault(weights.name, version)\n",
        test="tests/runtime/test_engine.py::"
        "test_a_request_keeps_the_version_it_was_admitted_with_while_the_adapter_is_replaced_and_unloaded",
    ),
    Mutation(
        defect=8,
        claim="Adapters with different target modules each get their own weights.",
        file="workbench/runtime/slots.py",
        old="            key = keys[row]\n",
        new="            key = (keys[row][0], 'q_proj')\n",
        test="tests/runtime/test_engine.py::test_adapters_with_different_targets_and_base_only_requests_share_a_batch",
    ),
    Mutation(
        defect=9,
        claim="A job that is done ends alone; the others go on.",
        file="workbench/loop/commit.py",
        old="        ledger.drop_job(job)",
        new="        [ledger.drop_job(other) for other in list(ledger.jobs.values())]",
        test="tests/test_mutations_jobs.py::test_jobs_end_each_with_its_own_data",
    ),
    Mutation(
        defect=9,
        claim="Accumulation does not divide the evaluation loss.",
        file=FORWARD,
        old="into[span.owner] = (total + loss,",
        new="into[span.owner] = (total + (loss if span.is_finetune else loss / 4),",
        test="tests/runtime/test_finetune.py::test_reported_losses_equal_peft",
    ),
    Mutation(
        defect=10,
        claim="Inference rows never enter an autograd graph.",
        file=FORWARD,
        old="        x = F.embedding(rows.token_ids, self.fused.embed)\n",
        new="        torch.set_grad_enabled(True)\n        x = F.embedding(rows.token_ids, self.fused.embed).requires_grad_()\n",
        test="tests/runtime/test_mixed_batch.py::test_inference_rows_never_enter_an_autograd_graph",
    ),
    Mutation(
        defect=11,
        claim="A backward runs the layers that were planned, so that decodes go on in between.",
        file=FORWARD,
        old="while done < work.num_layers and not should_stop():",
        new="while done < work.top_layer:",
        test="tests/runtime/test_finetune.py::test_gradients_equal_peft_with_forward_and_backward_cut_anywhere_beside_decodes",
    ),
    Mutation(
        defect=12,
        claim="A step's row adds up: no timer subtracts a stale end.",
        file="workbench/serving_loop.py",
        old="(start_s, end_s, plan_s, predicted_s), counts)",
        new="(start_s, start_s - result.duration_s, plan_s, predicted_s), counts)",
        test="tests/test_replay.py::test_step_rows_add_up_and_time_never_goes_back",
    ),
)
