"""Fine-tune jobs are independent: the one defect of the release that has no other home among the tests."""

from workbench.config import FinetuneJob, RandomTokens
from workbench.policies import ServeFirst
from workbench.replay import replay
from workbench.testing import FixedCost


def test_jobs_end_each_with_its_own_data():
    jobs = [
        FinetuneJob(adapter=name, data=RandomTokens(examples=count, tokens=4), epochs=1, max_tokens=4, batch_size=2)
        for name, count in (("short", 4), ("long", 12))
    ]
    result = replay([], executor=FixedCost(), policy=ServeFirst(step_s=1.0), jobs=jobs, planning=0.0, progress=False)
    assert result.jobs["committed_tokens"].tolist() == [4 * 4, 12 * 4]
    assert result.jobs["outcome"].tolist() == ["finished", "finished"]
    steps = result.events[result.events["kind"] == "optimizer_step"]
    assert steps.groupby("owner").size().to_dict() == {"job:short": 2, "job:long": 6}
