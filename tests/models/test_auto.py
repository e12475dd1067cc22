"""Auto classes know hybrids in whatever order things are imported, and ordinary models stay as they are."""

import subprocess
import sys

import pytest

from nha.models.auto import register
from tests.models.families import hybrid

LOAD = "{first}; model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); print(type(model).__name__)"
ORDERS = {
    "nha first": "import sys, nha; from transformers import AutoModelForCausalLM",
    "nha last": "import sys; from transformers import AutoModelForCausalLM; import nha",
    "a name of nha": "import sys; from nha import set_windows; from transformers import AutoModelForCausalLM",
    "models": "import sys, nha.models.auto; from transformers import AutoModelForCausalLM",
}


@pytest.mark.parametrize("first", ORDERS.values(), ids=ORDERS)
def test_a_saved_hybrid_loads_in_any_order_of_imports(first, tmp_path):
    hybrid().save_pretrained(tmp_path)
    code = LOAD.format(first=first)
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert found.stdout.strip() == "NHALlamaForCausalLM", found.stderr


def test_classes_are_registered_once():
    before = register.cache_info().misses
    register()
    assert before == register.cache_info().misses == 1
