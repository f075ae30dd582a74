"""Train with AFLoRA, serve as LoRA: an adapter file in the form of PEFT.

    pip install peft transformers
    python examples/to_peft.py      a demonstration with a tiny Llama, half a minute on a CPU
    python examples/to_peft.py adapter.pt BASE FOLDER AutoModelForCausalLM

The second command is for an adapter of a model of transformers: BASE is that model's folder or
name, the last word the class with which it was loaded. FOLDER can then be loaded by
`PeftModel.from_pretrained(base, FOLDER)`, and by whatever else serves LoRA files. PEFT keeps a
head of modules_to_save in the base's number format; AFLoRA trained it in float32. It compares the
ends of names: where "down" is a target it gives "blocks.0.down" a path as well, one of zeros.

What AFLoRA learned beside a weight is L_b B L_d A. With B' = L_b B L_d, of B's shape, that is
B' A: a plain LoRA of the same rank r. PEFT multiplies it by alpha / r, so alpha is r here.

The demonstration writes llama.pt and the folders llama and llama-lora where it is started.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # not needed beside aflora.py
import aflora  # noqa: E402


@torch.no_grad()
def to_peft(adapter_path, base_model, folder):
    """Writes adapter_model.safetensors and adapter_config.json, which PEFT loads, into a folder.

    adapter_path: a file of save_adapter.
    base_model: the plain model for it, of the class in which it was trained. It is used up: give
        PEFT another one.
    Raises AFLoRAError, before it writes, where PEFT cannot hold what was learned.
    """
    refused = f"{adapter_path} does not become a LoRA (merge_adapters() takes any adapter)"
    content = aflora.read_file(adapter_path, aflora.ADAPTER_FORMAT)
    config = content["config"]
    with aflora.blame(refused), TemporaryDirectory() as draft:
        aflora.add_adapters(base_model, **config)
        check_the_rest(content["values"], base_model.state_dict(), config)
        layers = aflora.load_adapter(base_model, adapter_path)

        # PEFT's layers take the place of ours. Heads have learned by now and are copied as such.
        aflora.replace_modules(base_model, {layer: layer.base for layer in layers.values()})
        lora = LoraConfig(r=config["rank"], lora_alpha=config["rank"],
                          target_modules=config["targets"],
                          modules_to_save=config["modules_to_save"] or None)
        served = get_peft_model(base_model, lora)
        for name, layer in layers.items():
            for key, factor in zip(("lora_A", "lora_B"), layer.lora_factors()):
                with aflora.blame(name):
                    base_model.get_parameter(f"{name}.{key}.default.weight").copy_(factor)
        served.save_pretrained(draft, save_embedding_layers=False)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            aflora.write_file(Path(folder, name), Path(draft, name).read_bytes())


def check_the_rest(values, start, config):
    """Raises AFLoRAError where one of a file's values changed that is of no adapter and no head.

    start: the state of the model, with adapters as they start.
    """
    heads = tuple(f"{name}." for name in config["modules_to_save"])
    for name, value in values.items():
        held = name.startswith(heads) or name.rpartition(".")[0] in config["targets"]
        with aflora.blame(name):
            if not held and not torch.equal(value, start[name].cpu()):
                raise aflora.AFLoRAError("it changed outside of targets and modules_to_save")


def demo():
    """Trains the Llama of your_own_model.py; compares it, merged, with the one through PEFT."""
    from your_own_model import llama_batches, llama_by_a_loop, plain_llama

    llama_by_a_loop()  # writes llama.pt, and the merged model into the folder llama
    to_peft("llama.pt", plain_llama(), "llama-lora")
    served = PeftModel.from_pretrained(plain_llama(), "llama-lora")
    merged = transformers.AutoModelForCausalLM.from_pretrained("llama")
    ids = llama_batches(99)[0]["input_ids"]
    difference = (served(ids).logits - merged(ids).logits).abs().max().item()
    print(f"llama-lora, through PEFT: a logit differs by at most {difference:.0e}")


def main(arguments):
    """The command line. Returns 0, or 2 after an error that the user can fix."""
    try:
        if arguments:
            with aflora.blame(f"{' '.join(arguments)}, as ADAPTER BASE FOLDER CLASS"):
                adapter_path, base, folder, class_name = arguments
                base_model = getattr(transformers, class_name).from_pretrained(base)
            to_peft(adapter_path, base_model, folder)
        else:
            demo()
    except aflora.AFLoRAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
