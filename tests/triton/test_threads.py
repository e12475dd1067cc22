"""Kernels that are compiled in threads before their first launch."""

from tests.triton.compilation import compiled


def test_kernels_are_compiled_and_loaded_and_not_run():
    (found,) = compiled("compile_in_threads")
    assert found == {
        "compiled": ["CompiledKernel"] * 2,  # of two dtypes
        "loaded": [True] * 2,  # by threads
        "launched_within": 0,
        "launched": 1,
        "kernels": 2,  # a launch afterwards compiles nothing
    }
