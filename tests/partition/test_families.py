"""Every parameter of every model family we know gets the role and the blocks written out in `families.py`."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from flavours import flavours, shapes_of
from multi_part import MULTI_PART

from titan_adam_mini.layout import Tiles
from titan_adam_mini.partition import Partition, collapse


@pytest.mark.parametrize("model", sorted(families.TITAN))
def test_every_parameter_of_every_flavour_of_torchtitan(model: str) -> None:
    spec, table = flavours(model), families.TITAN[model]
    assert spec["flavours"]
    seen = set()
    for flavour, args in spec["flavours"].items():
        shapes = shapes_of(spec["model_cls"], args)
        for name, blocks in Partition.from_config(args).assign(shapes).items():
            role, tiles = table[collapse(name)]
            want = tuple(Tiles.of(runs) for runs in tiles(shapes[name], args))
            assert (blocks.role, blocks.layout.dims) == (role, want), f"{flavour}: {name} {shapes[name]}"
            assert blocks.decay
            seen.add(collapse(name))
    assert seen == set(table), "the table names parameters that no flavour has"


def test_second_moments_of_llama3_8b() -> None:
    spec = flavours("llama3")
    args = spec["flavours"]["8B"]
    blocks = Partition.from_config(args).assign(shapes_of(spec["model_cls"], args))
    # 32 query heads, 8 key heads, 1024 values, wo 4096; w1 and w3 14336, w2 4096; two norms
    layer = 32 + 8 + 1024 + 4096 + 2 * 14336 + 4096 + 2
    assert layer == 37930
    # embedding and output 128256 each, the last norm
    assert sum(one.layout.num_blocks for one in blocks.values()) == 32 * layer + 2 * 128256 + 1 == 1470273
    assert sum(torch.Size(one.shape).numel() for one in blocks.values()) == 8_030_261_248


def spelled_out(table: dict[str, Any]) -> dict[str, Any]:
    """Two layers, and three experts, of every row with a number in its name."""
    names = {name: row for name, row in table.items() if "*" not in name}
    for name, row in table.items():
        if "*" in name:
            for layer in range(2):
                one = name.replace("*", str(layer), 1)
                names |= {one.replace("*", str(expert)): row for expert in range(3)}
    return names


@pytest.mark.parametrize("family", [*families.HUGGING_FACE, *families.OTHERS])
def test_names_of_hugging_face(family: str) -> None:
    config, table = (families.HUGGING_FACE | families.OTHERS)[family]
    rows = spelled_out(table)
    got = Partition.from_config(config).assign({name: shape for name, (shape, _, _) in rows.items()})
    assert {name: (one.shape, one.role, one.layout.grid_shape) for name, one in got.items()} == rows


@pytest.mark.parametrize("model", MULTI_PART)
def test_every_part_of_a_model_has_its_own_heads(model: str) -> None:
    _, config, table = MULTI_PART[model]
    rows = spelled_out(table)
    got = Partition.from_config(config).assign({name: shape for name, (shape, _, _) in rows.items()})
    assert {name: (one.shape, one.role, one.layout.grid_shape) for name, one in got.items()} == rows


@pytest.mark.parametrize("model", MULTI_PART)
def test_the_parts_are_what_transformers_builds(model: str) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with the installed transformers' own models")
    kind, config, table = MULTI_PART[model]
    real = transformers.AutoConfig.for_model(kind, **config)
    with torch.device("meta"):
        built = getattr(transformers, model)._from_config(real)
    shapes = {name: tuple(param.shape) for name, param in built.named_parameters()}
    rows = spelled_out(table)
    assert {collapse(name): shape for name, shape in shapes.items()} == {
        collapse(name): shape for name, (shape, _, _) in rows.items()
    }
    got = Partition.from_config(real).assign(shapes)
    assert {collapse(name): (one.role, one.layout.grid_shape) for name, one in got.items()} == {
        collapse(name): (role, grid) for name, (_, role, grid) in rows.items()
    }


@pytest.mark.parametrize("family", families.HUGGING_FACE)
def test_the_table_is_what_transformers_builds(family: str) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with the installed transformers' own models")
    config, table = families.HUGGING_FACE[family]
    real = getattr(transformers, f"{family}Config")(**config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(real)
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    if family == "Mixtral" and any("block_sparse_moe" in name for name in shapes):
        table = families.OTHERS["Mixtral before fused experts"][1]
    assert {collapse(name): shape for name, shape in shapes.items()} == {n: s for n, (s, _, _) in table.items()}
    got = Partition.from_config(real).assign(shapes)
    assert {collapse(name): (one.role, one.layout.grid_shape) for name, one in got.items()} == {
        name: (role, grid) for name, (_, role, grid) in table.items()
    }


def test_a_tied_output_counts_once() -> None:
    transformers = pytest.importorskip("transformers", reason="ties weights as transformers does")
    config = transformers.LlamaConfig(**families.CONFIG, tie_word_embeddings=True)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    names = dict(model.named_parameters())
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    got = Partition.from_config(config).assign({name: tuple(param.shape) for name, param in names.items()})
    assert sum(one.role == "token" for one in got.values()) == 1
