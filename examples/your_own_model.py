"""AFLoRA on models of transformers: a BERT through train(), a Llama in a loop of its own.

    pip install transformers
    python examples/your_own_model.py      half a minute on a CPU

Both are small and random, so nothing is downloaded; both learn a toy task. For a real model let
plain_bert() return BertForSequenceClassification.from_pretrained(...), and bert_batches(epoch)
a list of dict(tokenizer(texts, padding=True, return_tensors="pt"), labels=...): plain dicts. The
rest stays. Both are trained on the CPU; for a GPU put the model there before you call train(),
which moves the tensors of the batches behind it.

Writes adapter.pt, llama.pt and a folder llama where it is started.
"""

import os
import sys
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # not needed beside aflora.py
from aflora import (  # noqa: E402
    AdaptiveFreezer,
    add_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
    train,
)


def loss(model, batch):
    """Models of transformers compute it themselves where a batch has labels."""
    return model(**batch).loss


@torch.no_grad()
def mean_loss(model, batches):
    """The loss in evaluation mode, that is without dropout. The model stays in that mode."""
    model.eval()
    return sum(loss(model, batch).item() for batch in batches) / len(batches)


# ------------------------------------------------------------------------------ a BERT, by train()
def plain_bert():
    """A classifier of two classes: the same random one whenever it is asked for."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(
        vocab_size=40, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, pad_token_id=None, initializer_range=0.1))


def bert_batches(epoch):
    """100 batches of 32 texts of 12 tokens, with their labels.

    Tokens 0-9 speak for class 0, 10-19 for class 1, and 20-39, half of all, for none.
    """
    random = torch.Generator().manual_seed(epoch)
    shape = (100, 32, 12)
    labels = torch.randint(2, shape[:2], generator=random)
    words = 10 * labels[..., None] + torch.randint(10, shape, generator=random)
    fillers = torch.randint(20, 40, shape, generator=random)
    ids = torch.where(torch.rand(shape, generator=random) < 0.5, words, fillers)
    return [dict(input_ids=i, labels=y) for i, y in zip(ids, labels)]


def bert_by_train():
    """Returns the loss on texts never trained on, before and after: 0.68 and 0.01.

    Where the classifier alone trains, it ends at 0.49.
    """
    model = plain_bert()
    unseen = bert_batches(99)
    before = mean_loss(model, unseen)

    adapters = add_adapters(model, targets=["query", "value"], modules_to_save=["classifier"])
    steps = 3 * len(bert_batches(0))
    freezer = AdaptiveFreezer(adapters, total_steps=steps, t_i=steps // 10, t_f=steps // 2)
    precision = "bf16" if torch.cuda.is_available() else "fp32"  # few CPUs are quick in bf16
    train(model, bert_batches, loss, epochs=3, lr=4e-3, freezer=freezer, precision=precision)
    after = mean_loss(model, unseen)
    save_adapter(model, "adapter.pt")  # only what was learned
    size = os.path.getsize("adapter.pt")

    fresh = plain_bert()
    load_adapter(fresh, "adapter.pt")
    fresh.eval()
    logits = model(**unseen[0]).logits
    assert torch.equal(fresh(**unseen[0]).logits, logits)  # bit for bit
    merge_adapters(model)  # a plain BERT again: inference costs no more than before
    rounding = (model(**unseen[0]).logits - logits).abs().max()
    print(f"BERT: loss {before:.3f} -> {after:.3f}; adapter.pt has {size} bytes; merging moved a "
          f"logit by at most {rounding:.0e}")
    for name, step in freezer.frozen_at.items():
        print(f"frozen after step {step:3}: {name}")
    return before, after


# ------------------------------------------------------------------- a Llama, in a loop of its own
def plain_llama():
    """A small Llama: the same random one whenever it is asked for."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, bos_token_id=None, eos_token_id=None, initializer_range=0.2))


def llama_batches(epoch):
    """200 batches of 32 texts that count: each token is the one before it plus 1, modulo 32."""
    random = torch.Generator().manual_seed(epoch)
    starts = torch.randint(32, (200, 32, 1), generator=random)
    return [dict(input_ids=ids, labels=ids) for ids in (starts + torch.arange(12)) % 32]


def count_on(model):
    """The eight tokens that the model puts behind 5 6 7."""
    tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False)
    return tokens[0, 3:].tolist()


def llama_by_a_loop():
    """Returns the loss on texts never trained on, before and after."""
    model = plain_llama()
    batches = llama_batches(0)
    unseen = llama_batches(99)[:20]
    before = mean_loss(model, unseen)
    said = count_on(model)

    adapters = add_adapters(model, targets=["q_proj", "v_proj", "up_proj", "down_proj"])
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=4e-3, weight_decay=0)
    freezer = AdaptiveFreezer(adapters, total_steps=len(batches), t_i=10, t_f=20)
    model.train()  # from_pretrained gives a model in evaluation mode
    for batch in batches:
        loss(model, batch).backward()
        freezer.update()  # scores the whole, unscaled, unclipped gradients of this step
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        freezer.freeze(optimizer)  # and the optimizer forgets what is frozen
        optimizer.zero_grad(set_to_none=True)
    after = mean_loss(model, unseen)
    save_adapter(model, "llama.pt")

    fresh = plain_llama()
    load_adapter(fresh, "llama.pt")
    fresh.eval()
    assert torch.equal(fresh(**unseen[0]).logits, model(**unseen[0]).logits)
    merge_adapters(model)
    assert model.state_dict().keys() == plain_llama().state_dict().keys()
    model.save_pretrained("llama")  # a plain Llama again, which transformers alone can load
    loaded = LlamaForCausalLM.from_pretrained("llama")
    assert torch.equal(loaded(**unseen[0]).logits, model(**unseen[0]).logits)
    print(f"Llama: loss {before:.3f} -> {after:.3f}; after 5 6 7 it said {said}, now "
          f"{count_on(model)}; trainable on average {freezer.average_trainable():,.0f}")
    return before, after


if __name__ == "__main__":
    bert_by_train()
    llama_by_a_loop()
