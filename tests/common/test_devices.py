"""Which devices are taken."""

import pytest
import torch

from fedmmkt.common.config import ConfigError, RunConfig
from fedmmkt.common.devices import pick_devices


@pytest.mark.parametrize(("count", "expected"), [(0, ["cpu"]), (1, ["cuda"]), (3, ["cuda:0", "cuda:1", "cuda:2"])])
def test_auto_takes_all_gpus(count, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    assert pick_devices(("auto",)) == list(map(torch.device, expected))


def test_devices_are_listed_in_the_run_config():
    config = RunConfig.from_flower({"t2i.device": "cpu, cpu"})
    assert pick_devices(config.t2i.device) == [torch.device("cpu")] * 2


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"device 'gpu7' cannot be used .*; allowed: auto, cpu, cuda"):
        pick_devices(("cpu", "gpu7"))
