"""Chips and calibrations as data."""

import json

import pytest

from jaxllm.errors import ConfigError
from jaxllm.plan.chips import HERE, Calibration, calibration_of, chip, chips, read_calibration
from pallas_kernels.ragged_paged_attention import BACKENDS, tpu_sizes

H100 = HERE / "calibrations" / "h100.json"
NAMES = ["v4", "v5e", "v5p", "v6e", "tpu7x", "h100", "h200", "a100-80gb", "a100-40gb", "l4"]


def test_every_chip_is_whole():
    assert list(chips()) == NAMES
    for each in chips().values():
        assert min(each.memory, each.bandwidth, each.flops, each.links, each.link_bandwidth, each.domain) > 0
        assert each.sources and each.attention_backend in BACKENDS and each.platform in ("tpu", "gpu")
        assert each.device_limit(1) <= each.memory / each.devices
        if each.platform == "tpu":
            assert tpu_sizes.supports(each.kind) == (each.attention_backend == "tpu")
            assert each.dimensions in (2, 3) and each.links == 2 * each.dimensions


def test_a_chip_by_name():
    assert chip("H100").name == "h100"
    with pytest.raises(ConfigError, match=r"chip='b200': must be one of v4, v5e, .*l4"):
        chip("b200")


def test_two_devices_share_a_chip():
    whole = chip("tpu7x")
    assert whole.ceilings.bandwidth == whole.bandwidth / 2
    assert whole.device_limit(2) == pytest.approx(94.74 * 2**30, rel=1e-6)
    assert whole.all_reduce_seconds(1e9, 2) == 0.0  # within the chip
    assert whole.all_reduce_seconds(1e9, 4) > 0.0


def test_several_gpus_leave_room_for_their_messages():
    assert chip("h200").device_limit(4) < 0.85 * chip("h200").device_limit(1)
    assert chip("v6e").device_limit(4) == chip("v6e").device_limit(1)


def test_sums_over_shards_by_hand():
    assert chip("h100").all_reduce_seconds(4.5e11, 1) == 0.0
    assert chip("h100").all_reduce_seconds(4.5e11, 4) == pytest.approx(2 * 3 / 4)  # 18 links of 25 GB/s
    assert chip("v6e").all_reduce_seconds(1e11, 2) == pytest.approx(2 * 1 / 2)  # one link of 100 GB/s
    assert chip("v6e").all_reduce_seconds(1e11, 4) == pytest.approx(2 * 3 / 4 / 2)  # two of a square's
    assert chip("v5p").all_reduce_seconds(1e11, 8) == pytest.approx(2 * 7 / 8 / 3)  # three of a cube's


def test_products_are_interpolated_in_time():
    known = calibration_of(chip("h100"))
    assert isinstance(known, Calibration)
    for rows, bandwidth in known.gemm:
        assert known.gemm_seconds(rows, 1e9) == pytest.approx(1e9 / bandwidth)
    times = [known.gemm_seconds(rows, 1e9) for rows in (0.5, 1, 2, 63, 64, 65, 200, 256, 700, 2048, 4096, 8192)]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(4 * times[-3])
    assert calibration_of(chip("v6e")) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bandwidth": None}, "NoneType"),
        ({"bandwidth": 0}, "bandwidth=0.0: must be positive"),
        ({"step_seconds": -1}, "step_seconds=-1.0: must be positive"),
        ({"gemm": []}, "gemm must hold pairs"),
        ({"speed": 1}, "unknown: .'speed'."),
    ],
)
def test_bad_calibrations_are_refused(tmp_path, change, told):
    file = tmp_path / "chip.json"
    file.write_text(json.dumps(json.loads(H100.read_text()) | change))
    with pytest.raises(ConfigError, match=told):
        read_calibration(file)


def test_what_is_no_calibration_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_calibration(tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"missing: .*'gemm'"):
        read_calibration(tmp_path / "list.json")
