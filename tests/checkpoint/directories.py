"""Making, reading and damaging checkpoint directories, without the code under test."""

import json
import struct
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from v4_jax.config import Config
from v4_jax.number_formats import FP4_BLOCK, FP8_BLOCK, BlockScaled, scale_shape
from v4_jax.parameter_tree import declarations
from v4_jax.parameters import is_parameter

NUMPY = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
}
NAMES = {np.dtype(dtype): name for name, dtype in NUMPY.items()}


def read_file(path: Path) -> dict[str, np.ndarray]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], NUMPY[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }


def read_directory(path: Path) -> dict[str, np.ndarray]:
    return {name: array for file in sorted(path.glob("model*.safetensors")) for name, array in read_file(file).items()}


def write_file(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header, blobs, offset = {}, [], 0
    for name, array in tensors.items():
        blobs.append(np.ascontiguousarray(array).tobytes())
        end = offset + len(blobs[-1])
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(blobs))


def write_directory(path: Path, config: dict, tensors: dict[str, np.ndarray], shards: int = 2) -> Path:
    """A released-layout directory with the tensors dealt out over shards; one shard means no index."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_file(path / "model.safetensors", tensors)
        return path
    names = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    weight_map = {tensor: names[n % shards] for n, tensor in enumerate(tensors)}
    for name in names:
        write_file(path / name, {t: array for t, array in tensors.items() if weight_map[t] == name})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def write_run(path: Path, config: Config, trees: dict[int, dict], **options) -> Path:
    """The directory that a training run leaves, with the parameters of each of its steps."""
    import orbax.checkpoint as ocp

    path.mkdir(parents=True)
    (path / "run.json").write_text('{"format": "v4-jax training run", "version": 1}')
    (path / "config.json").write_text(json.dumps(config.to_hf()))
    with ocp.CheckpointManager(path / "checkpoints") as manager:
        for step, tree in trees.items():
            moments = ocp.args.StandardSave({"embed": tree["embed"]})
            params, progress = ocp.args.StandardSave(tree, **options), ocp.args.JsonSave({"step": step})
            manager.save(step, args=ocp.args.Composite(params=params, optimizer=moments, progress=progress))
    return path


def config_of(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


def assert_same_tensors(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


def assert_same_tree(a, b) -> None:
    """Same structure, dtypes, shapes and bytes."""
    leaves_a, tree_a = jax.tree_util.tree_flatten_with_path(a)
    leaves_b, tree_b = jax.tree_util.tree_flatten_with_path(b)
    assert tree_a == tree_b
    for (path, x), (_, y) in zip(leaves_a, leaves_b, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape), jax.tree_util.keystr(path)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)


def random_params(config: Config, seed: int = 0) -> dict:
    """Random parameters in the released formats, in host memory."""
    rng = np.random.default_rng(seed)

    def bits(shape, dtype, low, high):
        return rng.integers(low, high, shape, np.uint8).view(dtype)

    def leaf(parameter):
        shape, storage = parameter.shape, parameter.storage
        if storage == "i64":
            return rng.integers(0, config.n_routed_experts, shape, np.int32)
        if storage == "fp8" or (storage == "expert" and config.expert_dtype == "fp8"):
            codes = rng.standard_normal(shape, np.float32).astype(ml_dtypes.float8_e4m3fn)
            return BlockScaled(
                codes, bits(scale_shape(shape, FP8_BLOCK), ml_dtypes.float8_e8m0fnu, 118, 123), FP8_BLOCK
            )
        if storage == "expert":
            codes = bits(shape, ml_dtypes.float4_e2m1fn, 0, 16)
            return BlockScaled(
                codes, bits(scale_shape(shape, FP4_BLOCK), ml_dtypes.float8_e8m0fnu, 118, 123), FP4_BLOCK
            )
        values = 0.02 * rng.standard_normal(shape, np.float32)
        return values.astype(ml_dtypes.bfloat16) if storage == "bf16" else values

    return jax.tree.map(leaf, declarations(config), is_leaf=is_parameter)
