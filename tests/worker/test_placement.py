"""Layers are placed over unequal devices, and computed there they give what one device gives, bit for bit."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oasst_worker.engine import Engine, EngineConfig, GenerationParams
from oasst_worker.engine import Sequence as EngineSequence
from oasst_worker.model.attention import FP8, INT8, PlainAttention, kv_bytes
from oasst_worker.model.config import NeoXConfig, load_config
from oasst_worker.model.inputs import BLOCK_SIZE
from oasst_worker.model.linear import CompiledLinear
from oasst_worker.model.neox import NeoX
from oasst_worker.model.weights import LayerPlace, open_weights
from oasst_worker.runtime import RuntimeOptions, UnsupportedOptionError, build, build_executor
from oasst_worker.runtime.build import build_layered
from oasst_worker.runtime.memory import machine_bytes
from oasst_worker.runtime.placement import (
    DeviceMemory,
    UnplacedError,
    describe_places,
    find_devices,
    place_layers,
    spare_kv_tokens,
    weight_bytes,
)
from oasst_worker.runtime.runner import ModelRunner
from oasst_worker.settings import StartError, parse_device_memory, read_settings
from prompt_logits import prompt_logits

CPU = torch.device("cpu")
OPTIONS = RuntimeOptions(device="cpu", threads=1, kv_tokens=128, split="none")
# The 12 B model: 23.7 GB of fp16, of which a layer is 0.63 GB and the ends are 1 GB.
PYTHIA_12B = NeoXConfig(
    vocab_size=50288,
    hidden_size=5120,
    num_layers=36,
    num_heads=40,
    head_dim=128,
    intermediate_size=20480,
    rotary_dim=32,
    rotary_base=10000.0,
    max_positions=2048,
    layer_norm_eps=1e-5,
    parallel_residual=True,
    tie_word_embeddings=False,
    attention_bias=True,
    hidden_act="gelu",
    eos_token_id=0,
    bos_token_id=None,
    pad_token_id=None,
    dtype=torch.float16,
)
# Four layers of it: wide enough that a layer is no trifle beside the ends.
SMALL = {"num_hidden_layers": 4, "vocab_size": 96, "hidden_size": 64, "intermediate_size": 256}


def gpus(*gigabytes: float, cpu: float | None = None) -> list[DeviceMemory]:
    devices = [DeviceMemory(torch.device("cuda", index), int(size * 1e9)) for index, size in enumerate(gigabytes)]
    return devices if cpu is None else [*devices, DeviceMemory(CPU, int(cpu * 1e9))]


def place(
    devices: Sequence[DeviceMemory],
    *,
    kv_dtype: torch.dtype = torch.float16,
    kv_tokens: int = 2048,
    may_use_disk: bool = False,
) -> list[LayerPlace]:
    places = place_layers(
        PYTHIA_12B, torch.float16, devices, kv_dtype=kv_dtype, kv_tokens=kv_tokens, may_use_disk=may_use_disk
    )
    return [*places]


def counts(places: Sequence[LayerPlace]) -> list[tuple[str, int]]:
    return [(str(each.device) if each.is_kept else "disk", each.num_layers) for each in places]


def used_gb(places: Sequence[LayerPlace], devices: Sequence[DeviceMemory], kv_tokens: int) -> dict[str, float]:
    """By device: what the placement puts there, counted by hand."""
    used = {str(each.device): 0.0 for each in devices}
    used[str(devices[0].device)] = 2 * 50288 * 5120 * 2
    for each in places:
        layer = 2 * (12 * 5120**2 + 13 * 5120) * each.is_kept
        used[str(each.device)] += each.num_layers * (layer + 4 * 5120 * kv_tokens)
    return {name: size / 1e9 for name, size in used.items()}


def test_equal_devices_get_equal_parts():
    [(_, first), (_, second)] = counts(place(gpus(80, 80)))
    assert first + second == 36
    assert abs(first - second) <= 4


def test_an_unequal_device_gets_what_it_can_hold():
    devices = gpus(10, 24)
    places = place(devices)
    assert [device for device, _ in counts(places)] == ["cuda:0", "cuda:1"]
    used = used_gb(places, devices, 2048)
    assert 5 < used["cuda:0"] < 10
    assert used["cuda:1"] < 24


def test_a_cpu_is_left_alone_while_gpus_have_room():
    assert [device for device, _ in counts(place(gpus(20, 20, cpu=64)))] == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize("sizes", [(22, 7), (7, 22)])
def test_all_memory_is_used_where_it_is_needed(sizes):
    assert [device for device, _ in counts(place(gpus(*sizes)))] == ["cuda:0", "cuda:1"]


def test_what_gpus_cannot_hold_goes_to_the_cpu_and_the_rest_stays_on_disk():
    devices = gpus(6, 8, cpu=4)
    places = place(devices, may_use_disk=True)
    assert [device for device, _ in counts(places)] == ["cuda:0", "cuda:1", "cpu", "disk"]
    assert places[-1].device == CPU  # Reads and computes what is on disk.
    assert sum(each.num_layers for each in places) == 36
    for device, size in zip(devices, (6, 8, 4), strict=True):
        assert used_gb(places, devices, 2048)[str(device.device)] < size


def test_a_longer_cache_leaves_room_for_fewer_layers():
    devices = gpus(12, cpu=64)
    short, long = (counts(place(devices, kv_tokens=tokens))[0][1] for tokens in (2048, 32768))
    assert long < short


def test_a_cache_in_fp8_takes_half_the_room():
    devices = gpus(12, 12, cpu=64)
    assert place(devices, kv_tokens=16384, kv_dtype=FP8) == place(devices, kv_tokens=8192)
    assert place(devices, kv_tokens=16384, kv_dtype=FP8) != place(devices, kv_tokens=16384)


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        (gpus(8, 8), "take 25.2 GB, for which there is no room in 8 GB [+] 8 GB"),
        (gpus(1, 80), "embedding and head take 1.03 GB"),
    ],
)
def test_what_has_no_room_is_refused_with_what_to_change(devices, said):
    with pytest.raises(UnplacedError, match=said):
        place(devices)


def test_a_cache_too_big_for_the_last_device_is_refused_even_with_a_disk():
    with pytest.raises(UnplacedError, match="fewer --kv-tokens"):
        place(gpus(6, cpu=2), kv_tokens=32768, may_use_disk=True)


def spare(devices: Sequence[DeviceMemory], kv_dtype: torch.dtype = torch.float16) -> int:
    return spare_kv_tokens(PYTHIA_12B, torch.float16, devices, kv_dtype=kv_dtype, max_sequences=32, may_use_disk=True)


def test_the_cache_takes_what_weights_leave_and_at_least_one_sequence():
    assert weight_bytes(PYTHIA_12B, torch.float16) == pytest.approx(23.7e9, rel=0.01)
    plenty, some, none = (spare(devices) for devices in (gpus(80, 80), gpus(20, 10), gpus(6, 8, cpu=4)))
    assert (plenty, none) == (32 * 2048, 2048)
    assert 2048 < some < 32 * 2048
    place(gpus(20, 10), kv_tokens=some)
    with pytest.raises(UnplacedError):
        place(gpus(20, 10), kv_tokens=some + 2048)


def test_of_a_cache_in_fp8_twice_as_much_fits():
    some, in_fp8 = spare(gpus(20, 10)), spare(gpus(20, 10), FP8)
    assert in_fp8 in (2 * some, 2 * some + 2048)


@pytest.mark.parametrize(("kv_dtype", "positions"), [(torch.float16, 1000), (FP8, 2000)])
def test_a_gpus_cache_is_counted_in_its_own_bytes(kv_dtype, positions):
    memory = 1000 * 2 * 36 * 5120 * 2
    assert build._default_kv_tokens(PYTHIA_12B, kv_dtype, max_sequences=32, memory=memory + 1) == positions


@pytest.mark.parametrize(
    ("kv_dtype", "max_sequences", "kv_tokens", "positions"),
    [
        (torch.float16, 32, None, 8),
        (FP8, 32, None, 4),
        (FP8, 2, None, 1),
        (torch.float16, 32, 32 * 2048, 32),  # As asked.
        (torch.float16, 32, 2048, 1),
    ],
)
def test_a_cache_is_of_use_from_a_few_sequences_on(kv_dtype, max_sequences, kv_tokens, positions):
    """Counted in whole contexts of fp16: as much is given of what the weights leave."""
    options = replace(OPTIONS, max_sequences=max_sequences, kv_tokens=kv_tokens)
    wanted = build._wanted_cache_bytes(PYTHIA_12B, kv_dtype, options)
    assert wanted * 0.85 == pytest.approx(positions * 2048 * 2 * 36 * 5120 * 2, abs=1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_counted_as_they_lie_in_a_cpus_memory(make_checkpoint, dtype, quantize, tied):
    folder = make_checkpoint(**SMALL | {"vocab_size": 1024, "tie_word_embeddings": tied})
    model = build_executor(folder, replace(OPTIONS, dtype=dtype, quantize=quantize)).model
    parts = [part for layer in model._stacks[0]._kept.layers for part in vars(layer).values()]
    panels = [part._tensors[0] for part in [*parts, model._head] if isinstance(part, CompiledLinear)]
    held = model._embedding.nbytes + sum(tensor.nbytes for tensor in panels)  # But for norms and biases.
    assert build._cpu_weight_bytes(model.config, model.dtype, quantize) == pytest.approx(held, rel=0.05)


@pytest.mark.parametrize(("gigabytes", "dtype"), [(32, "bfloat16"), (48, "float32"), (64, "float32")])
def test_a_machine_holds_the_weights_and_the_cache_with_something_to_spare(gigabytes, dtype):
    memory, torch_dtype = gigabytes * 2**30, getattr(torch, dtype)
    cache = build._cpu_cache_bytes(PYTHIA_12B, torch_dtype, None, memory)
    assert 0 < cache < memory / 4
    assert weight_bytes(PYTHIA_12B, torch_dtype) + 2 * cache == memory


def test_a_large_machine_gives_a_cache_a_quarter_of_its_memory():
    assert build._cpu_cache_bytes(PYTHIA_12B, torch.float32, None, 2**37) == 2**35
    assert build._cpu_cache_bytes(PYTHIA_12B, torch.float32, "int8", 2**35) == 2**33


def test_a_cpus_cache_is_made_beside_the_weights(make_checkpoint, monkeypatch):
    folder = make_checkpoint(**SMALL)
    config = load_config(folder)
    cache = 40 * config.num_layers * kv_bytes(config, torch.float32)
    monkeypatch.setattr(build, "usable_bytes", lambda _: weight_bytes(config, torch.float32) + 2 * cache)
    runner = build_executor(folder, replace(OPTIONS, kv_tokens=None))
    assert runner.num_blocks == 40 // BLOCK_SIZE


def make_machine(root: Path, cgroup: str, limits: dict[str, str]) -> Path:
    """A tree of files as Linux shows them."""
    for path, text in {"proc/self/cgroup": cgroup, **limits}.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected"),
    [
        ("0::/", {"sys/fs/cgroup/memory.max": "5000"}, 5000),
        ("0::/pod/worker", {"sys/fs/cgroup/pod/worker/memory.max": "5000"}, 5000),
        # The pod has less than its parts may take.
        (
            "0::/pod/worker",
            {"sys/fs/cgroup/pod/worker/memory.max": "max", "sys/fs/cgroup/pod/memory.max": "3000"},
            3000,
        ),
        ("3:cpu:/a\n4:memory:/b", {"sys/fs/cgroup/memory/b/memory.limit_in_bytes": "4000"}, 4000),
        # A path of the machine's, in a container that has nothing above its own.
        ("4:cpu,memory:/docker/1f", {"sys/fs/cgroup/memory/memory.limit_in_bytes": "4000"}, 4000),
    ],
)
def test_a_container_has_the_memory_it_was_given(tmp_path, cgroup, limits, expected):
    assert machine_bytes(make_machine(tmp_path, cgroup, limits)) == expected


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096)])
def test_without_a_limit_there_is_the_machines_memory(tmp_path, limit):
    physical = machine_bytes(tmp_path)
    assert physical > 10**8
    assert machine_bytes(make_machine(tmp_path, "0::/", {"sys/fs/cgroup/memory.max": limit})) == physical


def test_places_are_described_by_layer():
    places = [LayerPlace(3, torch.device("cuda", 0)), LayerPlace(2, CPU), LayerPlace(1, CPU, is_kept=False)]
    assert describe_places(places) == "0-2 cuda:0, 3-4 cpu, 5-5 disk"


def test_devices_give_what_they_are_told_to():
    [told] = find_devices(CPU, {"cpu": 5}, "none")
    assert told == DeviceMemory(CPU, 5)
    [unset] = find_devices(CPU, {}, "none")
    assert unset.num_bytes > 10**8
    with pytest.raises(UnplacedError, match="names cuda:3; layers can be on cpu here"):
        find_devices(CPU, {"cuda:3": 5}, "none")


def test_memory_is_read_by_device():
    assert parse_device_memory("cuda:0=20GB, cpu=1.5GB,cuda:1=500MB") == {
        "cuda:0": 20 * 10**9,
        "cpu": 1500 * 10**6,
        "cuda:1": 500 * 10**6,
    }
    with pytest.raises(StartError, match="--device-memory: 'gpu=3' is not like cuda:0=20GB"):
        read_settings(["--model", "m", "--device-memory", "gpu=3"])


def generate(runner: ModelRunner) -> list[list[int]]:
    engine = Engine(runner, EngineConfig(eos_token_id=0, max_positions=64, max_sequences=4, step_tokens=24))
    tokens: dict[str, list[int]] = {}
    for length in (1, 9, 30):
        prompt = torch.randint(1, 96, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        params = GenerationParams(max_new_tokens=12, temperature=0, ignore_eos=True)
        engine.add(EngineSequence(str(length), prompt, params))
    while engine.has_work():
        for output in engine.step():
            tokens.setdefault(output.sequence_id, []).append(output.token_id)
    return [tokens[length] for length in ("1", "9", "30")]


def room_for(config: NeoXConfig, dtype: torch.dtype, *, layers: int, caches: int = 0, is_first: bool = False) -> int:
    """Bytes for so many layers and more caches; on the first device for the ends and accelerate's spare layer too."""
    ends = weight_bytes(replace(config, num_layers=0), dtype)
    cache = 2 * config.hidden_size * dtype.itemsize * 128
    layer = weight_bytes(replace(config, num_layers=1), dtype) - ends + cache
    return layers * layer + caches * cache + is_first * (ends + layer) + cache // 2


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_over_devices_and_disk_give_the_bits_of_one_device(make_checkpoint, caplog, dtype, quantize):
    folder = make_checkpoint(**SMALL)
    config, torch_dtype = load_config(folder), getattr(torch, dtype)
    options = replace(OPTIONS, dtype=dtype, quantize=quantize, split="layers", offload="disk")
    devices = [
        DeviceMemory(CPU, room_for(config, torch_dtype, layers=1, is_first=True)),
        DeviceMemory(CPU, room_for(config, torch_dtype, layers=2, caches=1)),
    ]
    with caplog.at_level(logging.INFO):
        layered = build_layered(folder, options, devices)
    assert "layers by device: 0-0 cpu, 1-2 cpu, 3-3 disk" in caplog.text
    alone = build_executor(folder, replace(OPTIONS, dtype=dtype, quantize=quantize))
    prompt = list(range(1, 50))
    assert torch.equal(prompt_logits(layered, prompt), prompt_logits(alone, prompt))
    assert generate(layered) == generate(alone)


def test_a_cpu_with_too_little_memory_reads_the_rest_from_disk(make_checkpoint, caplog):
    folder = make_checkpoint(**SMALL)
    memory = {"cpu": room_for(load_config(folder), torch.float32, layers=2, caches=2, is_first=True)}
    options = replace(OPTIONS, dtype="float32", split="auto", device_memory=memory, offload="disk")
    with caplog.at_level(logging.INFO):
        runner = build_executor(folder, options)
    assert "split=layers ranks=1: --device-memory or --offload is given" in caplog.text
    assert "layers by device: 0-1 cpu, 2-3 disk" in caplog.text
    assert generate(runner) == generate(build_executor(folder, replace(OPTIONS, dtype="float32")))
    with pytest.raises(UnsupportedOptionError, match="another --offload"):
        build_executor(folder, replace(options, offload="none"))


@pytest.mark.parametrize(
    ("places", "is_on_one_device"),
    [
        ([LayerPlace(4, CPU)], True),
        ([LayerPlace(2, CPU), LayerPlace(2, torch.device("meta"))], False),
        ([LayerPlace(4, torch.device("meta"))], False),
        ([LayerPlace(3, CPU), LayerPlace(1, CPU, is_kept=False)], False),
    ],
)
def test_a_model_knows_whether_one_device_has_all_of_it(make_checkpoint, places, is_on_one_device):
    folder = make_checkpoint(**SMALL)
    config = load_config(folder)
    weights = open_weights(folder, config, dtype=torch.float32, places=places)
    model = NeoX(config, weights, make_attention=PlainAttention)
    assert model.is_on_one_device is is_on_one_device


def test_placement_options_are_refused_for_other_splits(make_checkpoint):
    with pytest.raises(UnsupportedOptionError, match="are for --split layers"):
        build_executor(make_checkpoint(), replace(OPTIONS, offload="disk"))


@pytest.mark.parametrize(
    ("asked", "stored", "expected"),
    [
        ("auto", torch.float16, torch.bfloat16),
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float32, torch.float32),
        ("float32", torch.float16, torch.float32),
    ],
)
def test_a_cpu_beside_gpus_computes_in_a_dtype_that_it_has_a_kernel_for(
    make_model, tmp_path, caplog, asked, stored, expected
):
    make_model(**SMALL).to(stored).save_pretrained(tmp_path)
    config, meta = load_config(tmp_path), torch.device("meta")  # Like a GPU: no CPU.
    devices = [
        DeviceMemory(meta, room_for(config, expected, layers=1, is_first=True)),
        DeviceMemory(CPU, room_for(config, expected, layers=3, caches=3)),
    ]
    options = replace(OPTIONS, dtype=asked, split="layers", offload="cpu")
    with caplog.at_level(logging.INFO):
        model = build_layered(tmp_path, options, devices).model
    assert "layers by device: 0-0 meta, 1-3 cpu" in caplog.text
    assert ("dtype=bfloat16: the model is in float16" in caplog.text) is (expected is not stored and asked == "auto")
    assert model.dtype is expected
    assert isinstance(model._stacks[1].first_layer().qkv, CompiledLinear)


def test_float16_is_refused_where_a_layer_may_be_on_a_cpu(make_checkpoint):
    with pytest.raises(UnsupportedOptionError, match="--dtype float16 needs every layer on a GPU: use bfloat16"):
        build_layered(make_checkpoint(), replace(OPTIONS, dtype="float16"), gpus(1, cpu=1))


@pytest.mark.parametrize("devices", [[DeviceMemory(CPU, 10**9)], gpus(1, cpu=1)], ids=["cpu", "gpu and cpu"])
def test_a_cache_in_fp8_is_refused_where_a_layer_would_be_on_a_cpu(make_checkpoint, devices):
    with pytest.raises(UnsupportedOptionError, match="--kv-dtype fp8 needs every layer on a GPU: use int8 on a CPU"):
        build_layered(make_checkpoint(), replace(OPTIONS, kv_dtype="fp8"), devices)


def test_a_cache_in_fp8_is_refused_on_a_cpu(make_checkpoint):
    with pytest.raises(UnsupportedOptionError, match="use int8 on a CPU"):
        build_executor(make_checkpoint(), replace(OPTIONS, kv_dtype="fp8"))


@pytest.mark.parametrize("devices", [gpus(1), gpus(1, cpu=1)], ids=["gpu", "gpu and cpu"])
def test_a_cache_in_int8_is_refused_where_a_layer_would_be_on_a_gpu(make_checkpoint, devices):
    with pytest.raises(UnsupportedOptionError, match="--kv-dtype int8 needs --device cpu: on a GPU use fp8"):
        build_layered(make_checkpoint(), replace(OPTIONS, kv_dtype="int8"), devices)


@pytest.mark.parametrize(("kv_dtype", "size"), [(torch.float32, 32 * 4), (INT8, 32 + 4 * 4)])
def test_a_position_takes_its_numbers_and_their_scales(make_checkpoint, kv_dtype, size):
    config = load_config(make_checkpoint())
    assert (config.hidden_size, config.num_heads) == (32, 4)
    assert kv_bytes(config, kv_dtype) == 2 * size
    # A plain cache has these bytes; a compiled one pads heads to 16 numbers.
    attention = PlainAttention(config, dtype=torch.float32, device=CPU, kv_dtype=kv_dtype)
    assert attention.make_cache(3).nbytes == config.num_layers * 3 * BLOCK_SIZE * 2 * size


@pytest.mark.parametrize(("name", "dtype"), [("fp8", FP8), ("int8", INT8)])
def test_the_caches_dtype_reaches_the_cache(make_checkpoint, monkeypatch, name, dtype):
    if dtype is FP8:
        monkeypatch.setattr(build, "_choose_kv_dtype", lambda *_: FP8)  # As on a GPU.
    runner = build_executor(make_checkpoint(), replace(OPTIONS, kv_dtype=name))
    assert [cache.dtype for cache in runner.cache] == [dtype]
    assert prompt_logits(runner, [*range(1, 50)]).isfinite().all()
