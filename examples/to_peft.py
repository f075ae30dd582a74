"""Train with AFLoRA, serve as LoRA: an adapter file in the form of PEFT.

    pip install safetensors transformers peft
    python examples/to_peft.py      a demonstration with a tiny Llama, half a minute on a CPU
    python examples/to_peft.py adapter.pt BASE FOLDER AutoModelForCausalLM

The second command is for an adapter of a model of transformers: BASE is that model's folder or
name, the last word the class with which it was loaded. FOLDER can then be loaded by
`PeftModel.from_pretrained(base, FOLDER)`, and by whatever else serves LoRA files. PEFT keeps a
head of modules_to_save in the base's number format; AFLoRA trained it in float32.

What AFLoRA learned beside a weight is L_b B L_d A. With B' = L_b B L_d, of B's shape, that is
B' A: a plain LoRA of the same rank r. PEFT multiplies it by alpha / r, so alpha is r here.

The demonstration writes llama.pt and the folders llama and llama-lora where it is started.
"""

import itertools
import json
import re
import sys
from pathlib import Path

import safetensors.torch
import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # not needed beside aflora.py
from aflora import (  # noqa: E402
    ADAPTER_FORMAT,
    AFLoRAError,
    add_adapters,
    blame,
    load_adapter,
    read_file,
    write_file,
)


def to_peft(adapter_path, base_model, folder):
    """Writes adapter_model.safetensors and adapter_config.json, which PEFT loads, into a folder.

    adapter_path: a file of save_adapter.
    base_model: the plain model for it, of the class in which it was trained. It has the
        adapters afterwards: PEFT needs another one.
    Raises AFLoRAError, before it writes, where PEFT's files cannot hold what was learned.
    """
    content = read_file(adapter_path, ADAPTER_FORMAT)
    config = content["config"]
    with blame(adapter_path):
        layers = add_adapters(base_model, **config)
        for obstacle in obstacles(base_model, content):
            raise AFLoRAError(f"{obstacle}. Use load_adapter() and merge_adapters(), and save "
                              "the whole model")
    load_adapter(base_model, adapter_path)

    tensors = {}
    for name, layer in layers.items():
        A, B = layer.lora_factors()
        tensors[f"{name}.lora_A.weight"] = A
        tensors[f"{name}.lora_B.weight"] = B
    for name in config["modules_to_save"]:
        for key, value in base_model.get_submodule(name).state_dict().items():
            tensors[f"{name}.{key}"] = value
    tensors = {f"base_model.model.{name}": value.detach().cpu().contiguous().clone()
               for name, value in tensors.items()}
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    write_file(Path(folder, "adapter_model.safetensors"), weights)

    rank = config["rank"]
    text = json.dumps(dict(
        peft_type="LORA", task_type=None, inference_mode=True, r=rank, lora_alpha=rank,
        lora_dropout=0.0, bias="none", fan_in_fan_out=False,
        target_modules=target_modules(base_model, config["targets"]),
        modules_to_save=config["modules_to_save"] or None,
        base_model_name_or_path=getattr(base_model, "name_or_path", None) or None), indent=2)
    write_file(Path(folder, "adapter_config.json"), text.encode())


def target_modules(model, targets):
    """The whole names, or a pattern of exactly these where a name is also another's ending.

    PEFT takes "proj" in a list for every module whose name ends in ".proj", too.
    """
    endings = tuple(f".{name}" for name in targets)
    others = {name for name, _ in model.named_modules()} - set(targets)
    if any(name.endswith(endings) for name in others):
        return "|".join(re.escape(name) for name in targets)
    return targets


def obstacles(model, content):
    """Yields in words what an adapter file holds and PEFT's files cannot.

    model: with adapters as they start. content: what read_file gave.
    """
    targets = content["config"]["targets"]
    saved = content["config"]["modules_to_save"]
    modules = dict(model.named_modules(remove_duplicate=False))
    if not targets:
        yield "it adapts no module and has modules_to_save alone, which is no LoRA"
    for name in targets + saved:
        for other, module in modules.items():
            if module is modules[name] and other != name:
                yield f"{name} stands in the model as {other}, too, where PEFT may miss it"
    for name in saved:
        if isinstance(modules[name], (nn.ModuleList, nn.ModuleDict)):
            yield f"{name} in modules_to_save is a list of modules, which PEFT cannot replace"
        for other in modules:
            if other.endswith(name) and other != name:  # PEFT compares the ends of names
                yield f"PEFT would take {other} for {name} in modules_to_save"

    start = model.state_dict()
    values = content["values"]
    parts = itertools.product(targets, ("lora_A", "lora_B", "s_d", "s_b"))
    held = {f"{name}.{part}" for name, part in parts}
    for name in sorted(values.keys() - held):
        if name.startswith(tuple(f"{module}." for module in saved)):
            if not torch.is_tensor(values[name]):
                yield f"{name} is no tensor"
        elif not equal(values[name], start.get(name)):
            yield f"{name} was changed, outside of targets and modules_to_save"


def equal(one, other):
    """Are two values of a state the same? What modules add of their own need not be tensors."""
    if torch.is_tensor(one) and torch.is_tensor(other):
        return torch.equal(one.cpu(), other.cpu())
    return one == other


def demo():
    """Trains the Llama of your_own_model.py and compares its logits with those through PEFT."""
    from peft import PeftModel
    from your_own_model import llama_batches, llama_by_a_loop, plain_llama

    llama_by_a_loop()  # writes llama.pt
    model = plain_llama()
    to_peft("llama.pt", model, "llama-lora")
    served = PeftModel.from_pretrained(plain_llama(), "llama-lora")
    ids = llama_batches(99)[0]["input_ids"]
    with torch.no_grad():
        difference = (served.eval()(ids).logits - model.eval()(ids).logits).abs().max().item()
    print(f"llama-lora, through PEFT: a logit differs by at most {difference:.0e}")


def main(arguments):
    """The command line. Returns 0, or 2 after an error that the user can mend."""
    try:
        if not arguments:
            demo()
        elif len(arguments) == 4:
            import transformers
            adapter_path, base, folder, class_name = arguments
            with blame(f"{base} as {class_name}"):
                base_model = getattr(transformers, class_name).from_pretrained(base)
            to_peft(adapter_path, base_model, folder)
        else:
            raise AFLoRAError("give ADAPTER BASE FOLDER CLASS, or nothing: a demonstration")
    except AFLoRAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
