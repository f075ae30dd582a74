"""AFLoRA on models of transformers: a BERT through train(), a Llama in a loop of its own.

    pip install transformers && python examples/your_own_model.py      20 seconds on a CPU

Both are small and random, so nothing is downloaded; both learn a toy task. For a real model let
plain() return BertForSequenceClassification.from_pretrained(...), and let batches(epoch) return a
list of dict(tokenizer(texts, padding=True, return_tensors="pt"), labels=...): plain dicts, whose
tensors train() moves. The rest stays. Writes adapter.pt and llama.pt where it is started."""

import os, sys
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # not needed beside aflora.py
from aflora import (AdaptiveFreezer, add_adapters, load_adapter, merge_adapters,  # noqa: E402
                    save_adapter, train)


def loss(model, batch):
    """Models of transformers compute it themselves where a batch has labels."""
    return model(**batch).loss


@torch.no_grad()
def mean_loss(model, batches):
    model.eval()
    return sum(loss(model, batch).item() for batch in batches) / len(batches)


def bert_by_train():
    """Texts of 12 tokens: 0-9 speak for class 0, 10-19 for class 1, and 20-39, half of all, for
    none. Returns the loss on texts never trained on, before and after (0.01; 0.5 if the classifier
    alone trains)."""
    def plain():
        torch.manual_seed(0)  # the same random base whenever it is asked for
        return BertForSequenceClassification(BertConfig(
            vocab_size=40, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=128, pad_token_id=None, initializer_range=0.1))

    def batches(epoch):
        random = torch.Generator().manual_seed(epoch)
        labels, shape = torch.randint(2, (100, 32), generator=random), (100, 32, 12)
        words = 10 * labels[..., None] + torch.randint(10, shape, generator=random)
        fillers = torch.randint(20, 40, shape, generator=random)
        ids = torch.where(torch.rand(shape, generator=random) < 0.5, words, fillers)
        return [dict(input_ids=i, labels=y) for i, y in zip(ids, labels)]

    model, unseen = plain(), batches(99)
    before = mean_loss(model, unseen)

    adapters = add_adapters(model, targets=["query", "value"], modules_to_save=["classifier"])
    steps = 3 * len(batches(0))
    freezer = AdaptiveFreezer(adapters, total_steps=steps, t_i=steps // 10, t_f=steps // 2)
    train(model, batches, loss, epochs=3, lr=4e-3, freezer=freezer, precision="bf16")
    after = mean_loss(model, unseen)  # this switches dropout off, too
    save_adapter(model, "adapter.pt")           # what was learned; random matrices are a seed

    load_adapter(fresh := plain(), "adapter.pt")
    fresh.eval()
    logits = model(**unseen[0]).logits
    assert torch.equal(fresh(**unseen[0]).logits, logits)  # bit for bit
    merge_adapters(model)                       # inference costs no more; undo: unmerge_adapters
    rounding = (model(**unseen[0]).logits - logits).abs().max()
    print(f"BERT: loss {before:.3f} -> {after:.3f}; adapter.pt has {os.path.getsize('adapter.pt')} "
          f"bytes; merging moved a logit by at most {rounding:.0e}")
    for name, step in freezer.frozen_at.items():
        print(f"frozen after step {step:3}: {name}")
    return before, after


def llama_by_a_loop():
    """Counting: each token is the one before it plus 1, modulo 32. Returns losses as above."""
    def plain():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=32, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=128, bos_token_id=None, eos_token_id=None, initializer_range=0.2))

    def batches(epoch):
        starts = torch.randint(32, (200, 32, 1), generator=torch.Generator().manual_seed(epoch))
        return [dict(input_ids=ids, labels=ids) for ids in (starts + torch.arange(12)) % 32]

    def count_on(model):
        return model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False)[0, 3:]

    model, unseen = plain(), batches(99)[:20]
    before, heard = mean_loss(model, unseen), count_on(model)

    adapters = add_adapters(model, targets=["q_proj", "v_proj", "up_proj", "down_proj"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    freezer = AdaptiveFreezer(adapters, total_steps=len(batches(0)), t_i=10, t_f=20)
    model.train()  # from_pretrained gives a model in evaluation mode
    for step, batch in enumerate(batches(0), start=1):
        loss(model, batch).backward()
        freezer.update()                        # score: whole, unscaled, unclipped gradients
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        freezer.freeze(step, optimizer)         # and the optimizer forgets what it freezes
        optimizer.zero_grad(set_to_none=True)
    after = mean_loss(model, unseen)
    save_adapter(model, "llama.pt")

    load_adapter(fresh := plain(), "llama.pt")
    fresh.eval()
    assert torch.equal(fresh(**unseen[0]).logits, model(**unseen[0]).logits)
    merge_adapters(model)
    merged = model(**unseen[0]).logits
    for name, layer in adapters.items():        # only after merging: a plain Llama again,
        model.set_submodule(name, layer.base)   # which model.save_pretrained(folder) can write
    assert model.state_dict().keys() == plain().state_dict().keys()
    assert torch.equal(model(**unseen[0]).logits, merged)
    print(f"Llama: loss {before:.3f} -> {after:.3f}; after 5 6 7 it said {heard.tolist()}, now "
          f"{count_on(model).tolist()}; trainable on average {freezer.average_trainable():,.0f}")
    return before, after


if __name__ == "__main__":
    bert_by_train()
    llama_by_a_loop()
