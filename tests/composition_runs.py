"""What a model of :mod:`composition` must do: runs agree, all is trained, weights are saved, words are generated."""

from typing import Dict, Optional

import torch

from composition import FAMILIES, Case, made, stacks
from fairseq_adaptive.decoding.beam_generator import BeamGenerator
from fairseq_adaptive.modules import recording
from fairseq_adaptive.modules.transformer_xl.memory import SegmentMemory
from old_checkpoints.cases import task

UNUSED = ("sentence_order_head", "pooler", "lm_head")  # heads of which a task uses some


def words(lengths, generator, left=False):
    """B x T, padded on one side to the longest; each ends in </s>."""
    tokens = torch.full((len(lengths), max(lengths)), 1)
    for row, length in enumerate(lengths):
        some = torch.randint(4, 34, (length,), generator=generator)
        some[-1] = 2
        tokens[row, tokens.size(1) - length if left else 0 :][:length] = some
    return tokens


def inputs(case: Case, lengths, seed: int = 11) -> Dict[str, torch.Tensor]:
    """A batch, one sentence for each length; of images and bits the lengths are those of their task."""
    arch, generator = FAMILIES[case.family].arch, torch.Generator().manual_seed(seed)
    if arch == "shared_transformer":
        previous = [1 + length % 4 for length in lengths]
        return {
            "src_tokens": words(lengths, generator, left=True),
            "src_lengths": torch.tensor(lengths),
            "prev_output_tokens": words(previous, generator),
        }
    if arch == "adatape_parity":
        return {"elements": torch.randint(0, 3, (len(lengths), 12), generator=generator)}
    if arch == "adatape_vit":
        return {"image": torch.randn(len(lengths), 1, 8, 8, generator=generator, dtype=torch.float64)}
    if arch == "plain":
        x = torch.randn(len(lengths), max(lengths), 8, generator=generator, dtype=torch.float64)
        return {"x": x, "src_key_padding_mask": torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]}
    return {"src_tokens": words(lengths, generator)}


def there(case: Case, given) -> Optional[torch.Tensor]:
    """B x T, true where a batch has an output that somebody reads; None: everywhere."""
    arch = FAMILIES[case.family].arch
    if arch == "plain":
        return ~given["src_key_padding_mask"]
    name = "prev_output_tokens" if arch == "shared_transformer" else "src_tokens"
    return given[name].ne(1) if name in given else None


def output(case: Case, model, given) -> torch.Tensor:
    """B x T x ... or B x ..., what the model makes of a batch, without padding in it."""
    if FAMILIES[case.family].arch.startswith("par_"):
        memory, parts = SegmentMemory(), given["src_tokens"].split(4, 1)
        out = torch.cat([model(part, memory=memory)[0] for part in parts], 1)
    else:
        out = model(**given)
        out = out[0] if isinstance(out, tuple) else out
    mask = there(case, given)
    return out if mask is None else out[:, : mask.size(1)].masked_fill(~mask[..., None], 0.0)


def run(case: Case, model, given, packed: Optional[bool] = None):
    """Output and traces, without gradients."""
    for stack in stacks(model):
        stack.packed = packed
    with torch.no_grad(), recording(model) as traces:
        out = output(case, model, given)
    return out, [each for found in traces.values() for each in found]


def alone(case: Case, given, row: int) -> Dict[str, torch.Tensor]:
    """One sentence of a batch, without its padding."""
    one = {name: each[row : row + 1] for name, each in given.items()}
    for name in ("src_tokens", "prev_output_tokens"):
        if name in one:
            one[name] = one[name][one[name].ne(1)][None]
    if "x" in one:
        length = int((~one.pop("src_key_padding_mask")).sum())
        one["x"] = one["x"][:, :length]
        one["src_key_padding_mask"] = torch.zeros(1, length, dtype=torch.bool)
    return one


def hypotheses(model, given, beam: int = 2):
    """The best of each sentence, words and score."""
    generator = BeamGenerator([model], task().target_dictionary, beam_size=beam, max_len_b=6, max_len=6)
    if "prev_output_tokens" not in given:
        given = {"src_tokens": given["src_tokens"][:, :3], "src_lengths": torch.full((len(given["src_tokens"]),), 3)}
    with torch.no_grad():
        found = generator.generate([model], {"net_input": given})
    return [(each[0]["tokens"].tolist(), float(each[0]["score"])) for each in found]


def same(case: Case, one, other):
    """Equal up to rounding; a decoder without policies gives attention weights, which fairseq computes in float32."""
    family = FAMILIES[case.family]
    plain = family.arch == "shared_transformer" and (family.side == "encoder" or case[2:4] == ("none", "none"))
    size = 1e-5 if plain else 1e-10
    torch.testing.assert_close(one, other, rtol=size, atol=size)


def check_runs(case: Case, model, given):
    """Dense equals packed, in states and in who is computed."""
    dense, traces = run(case, model, given, packed=False)
    packed, others = run(case, model, given, packed=True)
    assert dense.isfinite().all() and traces
    same(case, packed, dense)
    for one, other in zip(traces, others, strict=True):
        # a tape may hold a token twice: rounding chooses between equal scores, and nothing else differs
        counts = [(trace.updates * trace.tokens) for trace in (one, other)]
        counts = counts if case.reader == "none" else [each.sort(1).values for each in counts]
        assert torch.equal(*counts)
    return packed


def check_training(case: Case, model, given):
    """A step: every parameter has a finite gradient."""
    for stack in stacks(model):
        stack.packed = None
    with recording(model) as traces:
        loss = output(case, model.train(), given).sin().sum()
    for name, stack in model.named_modules():
        policies = [
            each for each in (getattr(stack, "router", None), getattr(stack, "halting", None)) if each is not None
        ]
        loss = loss + sum(each.price(trace) for each in policies for trace in traces.get(name, ()))
    loss.backward()
    for name, each in model.named_parameters():
        found = each.grad is not None and bool(each.grad.isfinite().all())
        assert found or any(part in name for part in UNUSED), f"no finite gradient: {name}"
    model.eval()


def check_saving(case: Case, model, given, packed):
    """Weights load into a model that began elsewhere, which then does the same."""
    again = made(case, seed=2)
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(run(case, again, given)[0], packed)


def check_steps(case: Case, model, given):
    """One token at a time, with sentences reordered as a beam search does, is as all at once."""
    arch = FAMILIES[case.family].arch
    name = "prev_output_tokens" if arch == "shared_transformer" else "src_tokens"
    given = {key: each.repeat_interleave(2, 0) for key, each in given.items()}  # hypotheses of one sentence
    tokens = given[name].masked_fill(given[name].eq(1), 5)
    tokens[::2, 1:] += 1
    for stack in stacks(model):
        stack.packed = None
    extra = {}
    with torch.no_grad():
        if arch == "shared_transformer":
            extra["encoder_out"] = model.encoder(given["src_tokens"], given["src_lengths"])
        whole = model.decoder(tokens, **extra)[0]
        order, state = torch.arange(len(tokens)).view(-1, 2).flip(1).flatten(), {}
        for step in range(tokens.size(1)):
            if step == tokens.size(1) // 2:
                model.decoder.reorder_incremental_state_scripting(state, order)
                tokens, whole = tokens[order], whole[order]
                extra = {key: model.encoder.reorder_encoder_out(each, order) for key, each in extra.items()}
            out = model.decoder(tokens[:, : step + 1], incremental_state=state, **extra)[0]
            same(case, out[:, -1], whole[:, step])


def check(case: Case, lengths=(5, 2, 4)):
    """All of it."""
    model, given = made(case), inputs(case, lengths)
    check_saving(case, model, given, check_runs(case, model, given))
    if hasattr(model, "decoder"):
        check_steps(case, model, given)
    check_training(case, model, given)
