"""`generate_batch` of hybrids: transformers' call for lists of prompts, in left-padded batches.

transformers' continuous batching keeps keys and values of all layers in pages and has no place for slots: its kinds of
layers and its attention functions are fixed lists. What it returns is made here with `generate` instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nha.models.head import batch_tokens

if TYPE_CHECKING:
    from transformers.generation.continuous_batching.requests import GenerationOutput


def generate_in_batches(
    model: Any,
    inputs: list[list[int]],
    config: Any,
    *,
    max_new_tokens: int | None = None,
    max_rows: int | None = None,
    return_logprobs: bool = False,
) -> dict[str, GenerationOutput]:
    """The answers of transformers' `generate_batch` to prompts of token ids, in the order of the prompts.

    Prompts of similar length are written together, `max_rows` at a time or as many as memory holds. A request ends with
    its end token or after `max_new_tokens`; with `return_logprobs` it has the log-probability of each token under what
    it was taken from. Raises ValueError for an empty prompt.

    >>> from nha import NHAConfig, NHAForCausalLM
    >>> model = NHAForCausalLM(NHAConfig.tiny(eos_token_id=None)).eval()
    >>> found = model.generate_batch([[5, 6, 7], [9]], max_new_tokens=4)
    >>> [(name, output.prompt_ids, len(output.generated_tokens)) for name, output in found.items()]
    [('req_0', [5, 6, 7], 4), ('req_1', [9], 4)]
    """
    if not all(inputs):
        raise ValueError(
            f"expected prompts of at least one token, got none in prompt {[*map(bool, inputs)].index(False)}"
        )
    copies = config.num_return_sequences or 1
    new = max_new_tokens if max_new_tokens is not None else config.max_new_tokens
    order = sorted(range(len(inputs)), key=lambda index: len(inputs[index]))
    found: dict[int, list[GenerationOutput]] = {}
    while order:
        room = batch_tokens(model) // (copies * (len(inputs[order[-1]]) + (new or 0)))
        rows = max(1, room if max_rows is None else min(room, max_rows // copies))
        batch, order = order[-rows:], order[:-rows]
        outputs = write(model, [inputs[index] for index in batch], config, new, return_logprobs)
        for place, index in enumerate(batch):
            found[index] = outputs[place * copies : (place + 1) * copies]
    result = {}
    for index in range(len(inputs)):
        *children, parent = found[index]  # transformers names the first copies after the last
        for number, output in enumerate((*children, parent)):
            output.request_id = f"req_{index}" if output is parent else f"req_{index}__child#{number}"
            result[output.request_id] = output
    return result


@torch.no_grad()
def write(
    model: Any, prompts: list[list[int]], config: Any, max_new_tokens: int | None, return_logprobs: bool
) -> list[GenerationOutput]:
    """The outputs of one left-padded batch, `num_return_sequences` for each prompt."""
    from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    ends = config.eos_token_id if config.eos_token_id is not None else model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends} - {None, -1}
    options: dict[str, Any] = {"return_dict_in_generate": return_logprobs, "output_scores": return_logprobs}
    if config.pad_token_id is None:
        options["pad_token_id"] = min(ends, default=0)
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    made = model.generate(ids, attention_mask=mask, generation_config=config, **options)
    tokens = (made.sequences if return_logprobs else made)[:, longest:]
    logprobs: list[list[float]] = [[] for _ in tokens]
    if return_logprobs:
        scores = torch.stack(made.scores, 1).float().log_softmax(-1)
        logprobs = scores.gather(2, tokens[..., None])[..., 0].tolist()
    outputs = []
    for row, written in enumerate(tokens.tolist()):
        stop = next((place + 1 for place, token in enumerate(written) if token in ends), len(written))
        output = GenerationOutput("", prompts[row * len(prompts) // len(tokens)], written[:stop], logprobs[row][:stop])
        output.status = RequestStatus.FINISHED
        outputs.append(output)
    return outputs
