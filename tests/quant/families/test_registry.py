import ast
import pkgutil
import sys
from pathlib import Path

import pytest

from lowbit.quant import families
from lowbit.quant.families import base


def test_every_file_of_the_folder_is_a_family():
    files = {module.name for module in pkgutil.iter_modules(families.__path__)} - {"base"}
    assert set(families.names()) == files


def test_the_fallback_is_one_and_comes_last():
    fallbacks = [name for name in families.names() if families.get(name).fallback]
    assert fallbacks == ["default"] == list(families.names()[-1:])


def test_an_unknown_family_lists_those_there_are():
    with pytest.raises(ValueError, match=r"'flux'.*qwen_image, wan, default"):
        families.get("flux")


def test_families_import_the_standard_library_alone():
    for file in Path(base.__file__).parent.glob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        imported = [
            alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
        ]
        imported += [
            node.module for node in nodes if isinstance(node, ast.ImportFrom) if not node.level
        ]
        assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names, file


@pytest.mark.parametrize("name", families.names())
def test_real_shapes_are_positive_and_in_multiples_of_256(name):
    for layers in families.get(name).shapes.values():
        for layer in layers:
            assert layer.N % 256 == layer.K % 256 == 0
            assert layer.tokens and all(tokens > 0 for tokens in layer.tokens)


def test_the_tokens_of_wan_follow_from_its_video_sizes():
    def tokens(width, height, frames, side):
        return (frames + 3) // 4 * (height // side) * (width // side)

    wan = families.get("wan").shapes
    assert wan["14B"][0].tokens == (tokens(832, 480, 81, 16), tokens(1280, 720, 81, 16))
    assert wan["5B"][0].tokens == (tokens(1280, 704, 121, 32),)


def test_blocks_are_counted_to_the_first_gap():
    wan = families.get("wan")
    keys = [f"blocks.{i}.norm3.weight" for i in (0, 1, 2, 4)]
    assert wan.count_blocks(keys) == 3
    assert wan.count_blocks(["vace_blocks.0.norm3.weight"]) == 0
    assert wan.count_blocks([]) == 0
