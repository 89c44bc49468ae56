"""The hook into transformers: there after `import hfprune`, whatever is imported first, and lean."""

import subprocess
import sys

import pytest

CHECK = (
    "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as A, AUTO_QUANTIZER_MAPPING as B; "
    "assert 'hfprune' in A and 'hfprune' in B"
)


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "order",
    [
        "import hfprune, transformers",
        "import transformers, hfprune",
        "import transformers; transformers.ViTModel; import hfprune",
        "import hfprune, transformers; transformers.ViTModel",
        "import hfprune, sys; del sys.modules['hfprune']; import hfprune",
        "import transformers.quantizers.auto, hfprune, sys; del sys.modules['hfprune']; import hfprune",
        "import hfprune, transformers.quantizers.auto, hfprune.loader",
        "import hfprune.errors",
    ],
)
def test_it_is_registered(order):
    run(f"{order}; {CHECK}")


def test_nothing_heavy_is_imported():
    code = "import hfprune, transformers.quantizers.auto, sys; print(*sys.modules)"
    found = {name for name in run(code).split() if name.split(".")[0] in ("hfprune", "pydantic", "timm", "scipy")}
    assert {name for name in found if name.startswith("hfprune")} == {"hfprune", "hfprune.loader"}
    assert "pydantic" not in found


def test_the_loader_of_the_registry_is_as_python_made_it():
    code = (
        "import hfprune, inspect, transformers.quantizers.auto as auto; "
        "assert type(auto.__spec__.loader).__name__ == 'SourceFileLoader'; "
        "assert 'exec_module' not in vars(auto.__spec__.loader); assert inspect.getsource(auto.AutoHfQuantizer)"
    )
    run(code)


def test_in_a_spawned_process(tmp_path):
    (tmp_path / "child.py").write_text(f"def check():\n    import hfprune\n    {CHECK}\n    print('registered')\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import multiprocessing, child\n"
        "if __name__ == '__main__':\n"
        "    job = multiprocessing.get_context('spawn').Process(target=child.check)\n"
        "    job.start(); job.join(); assert job.exitcode == 0"
    )
    (tmp_path / "main.py").write_text(code)
    done = subprocess.run([sys.executable, tmp_path / "main.py"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, "registered"), done.stderr[-2000:]
