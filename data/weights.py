"""From a Hugging Face folder to tensors: config.json, .safetensors or .bin, names as in our BERT.

No file that is read here can run code.
"""

import json
from pathlib import Path

import torch

from aflora import AFLoRAError, blame, expect_equal, whole

RENAMED = {  # names in Hugging Face's checkpoints -> names here; old ones have .gamma, .beta
    "module.": "", ".gamma": ".weight", ".beta": ".bias", "bert.": "", "encoder.layer.": "layers.",
    "embeddings.LayerNorm": "embedding_norm", "embeddings.word": "word",
    "embeddings.position": "position", "embeddings.token": "token", "attention.self.": "",
    ".dense": "", "attention.output.LayerNorm": "attention_norm",
    "attention.output": "attention_output", "output.LayerNorm": "output_norm"}
SUPPORTED = dict(
    model_type="bert", hidden_act="gelu", position_embedding_type="absolute", is_decoder=False,
    quantization_config=None)
KINDS = dict(
    F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64,
    I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8, BOOL=torch.bool)


def read_config(folder):
    """config.json as a dict. AFLoRAError if it describes a model that our BERT cannot be."""
    path = Path(folder, "config.json")
    with blame(path):
        config = SUPPORTED | json.loads(path.read_bytes())
        expect_equal(config, config | SUPPORTED)
        hidden = config["hidden_size"]
        heads = whole("num_attention_heads", config["num_attention_heads"], 1)
        if hidden % heads != 0:
            raise AFLoRAError(f"num_attention_heads {heads} does not divide hidden_size {hidden}")
    return config


def load_state(model, folder):
    """Loads a folder's weights into our BERT. What that lacks, such as a pooler, is left out."""
    paths = [Path(folder, "model.safetensors"), Path(folder, "pytorch_model.bin")]
    path = max(paths, key=Path.exists)  # the first of those that exist
    with blame(path):
        if not path.exists() and list(Path(folder).glob("*.index.json")):
            raise AFLoRAError("the weights are in several shards, see index.json: write one file "
                              "by save_pretrained(folder, max_shard_size='9GB') of transformers")
        state = {}
        for name, tensor in read_weights(path).items():
            for old, new in RENAMED.items():
                name = name.replace(old, new)
            state[name] = tensor
        model.load_state_dict({name: state[name] for name in model.state_dict()})


def read_weights(path):
    """{name: tensor} of a .bin or .safetensors file."""
    if path.suffix == ".bin":
        return torch.load(path, map_location="cpu", weights_only=True)
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")  # length of the header, header, values
    header = json.loads(data[8:start])
    values = data[start:]
    header.pop("__metadata__", None)
    begins, ends = zip(*sorted(entry["data_offsets"] for entry in header.values()))
    if (*begins, len(values)) != (0, *ends):
        raise AFLoRAError("its header does not lay the tensors end to end, from 0 to the last byte")
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensor = torch.frombuffer(values[begin:end], dtype=KINDS[entry["dtype"]])
        tensors[name] = tensor.reshape(entry["shape"])
    return tensors
