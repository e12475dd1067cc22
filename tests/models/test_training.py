"""Hybrids are trained, compiled, copied and served by the tools of the ecosystem, unchanged."""

import copy
import pickle

import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    StaticCache,
    Trainer,
    TrainingArguments,
    pipeline,
)

from nha import NHAConfig, NHAForCausalLM
from nha.models.cache import nha_layers
from nha.models.windows import attention_layers
from tests.inputs import assert_close_to
from tests.models.families import hybrid, sliding, tokens

MODELS = [
    ("llama", [8, 8, 8], {}),
    ("llama", [8, -1, 0], {}),
    ("gemma3_text", [-1, 8, -1], sliding(12)),
    ("phi3", [8, -1, 0], {}),
    ("nha", [8, -1, 0], {}),
]
each_model = pytest.mark.parametrize("family, windows, changes", MODELS, ids=str)

each_compiled = pytest.mark.parametrize("family, windows, changes", [MODELS[1], MODELS[2], MODELS[4]], ids=str)


def build(family, windows, **changes):
    if family != "nha":
        return hybrid(family, windows, **changes)
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 3, "initializer_range": 0.2, "num_sinks": 1, "vocab_size": 97}
    return NHAForCausalLM(NHAConfig.tiny(window_sizes=windows, **sizes)).eval()


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def step(model, ids):
    """Loss and gradients by name of one training step."""
    model.train().zero_grad()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_same_step(found, wanted):
    assert_close_to(found[0], wanted[0], "loss")
    assert found[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        assert_close_to(found[1][name], grad, name)


@each_model
def test_lora_trains_saves_and_loads_with_the_same_bits(family, windows, changes, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    ids = tokens(2, 40)
    plain = logits(build(family, windows, **changes), ids)
    config = LoraConfig(r=4, target_modules=["o_proj", "g_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(build(family, windows, **changes), config)
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], 0.5)
    for _ in range(2):  # the first step moves B only, which starts at zero
        model.train().zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    adapted = {name for name, x in model.named_parameters() if x.grad is not None and x.grad.abs().max() > 0}
    converted = sum(window != -1 for window in windows)
    assert sum("g_proj.lora" in name for name in adapted) == 2 * converted
    trained = logits(model.eval(), ids)
    assert not torch.equal(trained, plain)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family, windows, **changes), str(tmp_path)).eval()
    assert torch.equal(logits(loaded, ids), trained)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert loaded.generate(input_ids=ids, **options).shape == (2, 46)
    merged = loaded.double().merge_and_unload()
    assert_close_to(logits(merged, ids), logits(model.double(), ids), "merged")


@each_model
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
def test_gradient_checkpointing_gives_equal_gradients(family, windows, changes, reentrant):
    ids = tokens(2, 40)
    model = build(family, windows, **changes).double()
    wanted = step(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_step(step(model, ids), wanted)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@each_compiled
def test_a_compiled_training_step_equals_eager(family, windows, changes, fresh_compiler):
    ids = tokens(2, 40)
    model = build(family, windows, **changes).double()
    wanted = step(model, ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    loss = compiled(ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert_same_step((loss.detach(), {n: x.grad for n, x in model.named_parameters() if x.grad is not None}), wanted)


def test_a_compiled_forward_pass_knows_padding(fresh_compiler):
    model = build("llama", [8, -1, 0]).double()
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :7] = 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, wanted = (logits(one, ids, attention_mask=mask, use_cache=False) for one in (compiled, model))
    assert_close_to(found[mask.bool()], wanted[mask.bool()])


@each_compiled
def test_a_compiled_decoding_step_equals_eager_and_is_compiled_once(family, windows, changes, fresh_compiler):
    model, ids = build(family, windows, **changes).double(), tokens(2, 30)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    whole = logits(model, ids, use_cache=False)
    cache = StaticCache(config=model.config, max_cache_len=64)
    logits(model, ids[:, :14], past_key_values=cache, use_cache=True)  # at 14, windows and sliding layers are full
    held = [x.data_ptr() for layer in nha_layers(cache) for x in layer.state.tensors().values()]
    for at in range(14, 30):
        if at == 16:
            torch.compiler.set_stance("fail_on_recompile")
        position = torch.full((2, 1), at)
        try:
            found = logits(compiled, ids[:, at : at + 1], past_key_values=cache, use_cache=True, position_ids=position)
        finally:
            if at == 29:
                torch.compiler.set_stance("default")
        assert_close_to(found[:, 0], whole[:, at], f"token {at}")
    assert held == [x.data_ptr() for layer in nha_layers(cache) for x in layer.state.tensors().values()]


class Repeats(Dataset):
    """The same few sequences over and over: something that is quickly learned."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = tokens(1, 24, seed=index % 4)[0]
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("family, windows, changes", [MODELS[1], MODELS[4]], ids=str)
def test_trainer_lowers_the_loss_and_resumes_where_it_stopped(family, windows, changes, tmp_path):
    def trainer(model):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            save_steps=3,
            logging_steps=1,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        return Trainer(model=model, args=arguments, train_dataset=Repeats())

    first = trainer(build(family, windows, **changes))
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    second = trainer(build(family, windows, **changes))
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    resumed = [entry["loss"] for entry in second.state.log_history if "loss" in entry]
    assert resumed == losses
    for (name, a), b in zip(first.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6").eval()
    assert torch.equal(logits(loaded, tokens()), logits(second.model.eval(), tokens()))


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 97))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


@each_model
def test_a_saved_hybrid_serves_a_pipeline(family, windows, changes, tmp_path):
    build(family, windows, **changes).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    serve = pipeline("text-generation", model=str(tmp_path), device="cpu")
    prompts = ["w3 w7 w9 w20", " ".join(f"w{3 + i}" for i in range(20))]
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    alone = [serve(prompt, **options)[0]["generated_text"] for prompt in prompts]
    together = [found[0]["generated_text"] for found in serve(prompts, batch_size=2, **options)]
    assert together == alone
    assert all(text.strip() for text in alone)


@each_model
def test_copied_and_pickled_models_predict_the_same_bits(family, windows, changes):
    model, ids = build(family, windows, **changes), tokens(2, 40)
    wanted = logits(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert torch.equal(logits(twin, ids), wanted)
        with torch.no_grad():
            attention_layers(twin)[2].nha_marker = True
            for weight in twin.parameters():
                weight.zero_()
    assert torch.equal(logits(model, ids), wanted)
    assert not hasattr(attention_layers(model)[2], "nha_marker")


def test_a_saved_module_is_loaded_by_torch(tmp_path):
    model, ids = build("llama", [8, -1, 0]), tokens(1, 40)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
