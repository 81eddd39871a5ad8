"""Write a trained checkpoint as a DeepSeek-V3 model folder, and measure what is in it.

`python -m examples.train_demo_model.export --work-dir build/demo_model --output moemesh/demo_model`
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM

from .baselines import NgramModels
from .corpus import Kind
from .data import held_out_rows
from .fp8 import dequantise, quantise
from .model import LoadBalancer, build_model, demo_config
from .model_card import Figures, model_card
from .tokenizer import save_tokenizer
from .train import Progress, describe_loads, mean_loss, prepare

KEPT_IN_BFLOAT16 = ("embed_tokens.weight", "lm_head.weight", "norm.weight", "mlp.gate.weight")
WRITTEN_BY_DEEPSEEK = {
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
    "ep_size": 1,
    "num_nextn_predict_layers": 0,
    "rope_scaling": None,
    "rope_theta": 10000,
}
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}
DEEPSEEKS_FIELDS = """
attention_bias attention_dropout bos_token_id eos_token_id first_k_dense_replace hidden_act hidden_size
initializer_range intermediate_size kv_lora_rank max_position_embeddings model_type moe_intermediate_size n_group
n_routed_experts n_shared_experts norm_topk_prob num_attention_heads num_experts_per_tok num_hidden_layers
num_key_value_heads pad_token_id q_lora_rank qk_nope_head_dim qk_rope_head_dim rms_norm_eps routed_scaling_factor
tie_word_embeddings topk_group use_cache v_head_dim vocab_size
"""


def per_expert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of the model under the names of DeepSeek's checkpoints: each expert's matrices by themselves."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for expert, matrix in enumerate(tensor):
                gate, up = matrix.chunk(2)
                result[f"{prefix}.{expert}.gate_proj.weight"] = gate
                result[f"{prefix}.{expert}.up_proj.weight"] = up
        elif last == "down_proj":
            for expert, matrix in enumerate(tensor):
                result[f"{prefix}.{expert}.down_proj.weight"] = matrix
        else:
            result[name] = tensor
    return result


def quantised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Linear weights in float8 with their scales; what DeepSeek keeps wider in bfloat16 or float32."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("e_score_correction_bias"):
            result[name] = tensor.float().contiguous()
        elif name.endswith(KEPT_IN_BFLOAT16) or "norm" in name:
            result[name] = tensor.bfloat16().contiguous()
        else:
            result[name], result[name + "_scale_inv"] = quantise(tensor)
    return result


def dequantised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain weights that a quantised state stands for."""
    suffix = "_scale_inv"
    return {
        name: dequantise(tensor, state[name + suffix]) if name + suffix in state else tensor.float()
        for name, tensor in state.items()
        if not name.endswith(suffix)
    }


def deepseek_config(config: DeepseekV3Config) -> dict[str, Any]:
    """config.json as DeepSeek writes it, with the fields that transformers leaves out."""
    values = config.to_dict()
    fields = {name: values[name] for name in DEEPSEEKS_FIELDS.split()}
    fields |= {"architectures": ["DeepseekV3ForCausalLM"], "torch_dtype": "bfloat16", **WRITTEN_BY_DEEPSEEK}
    return dict(sorted(fields.items())) | {"quantization_config": QUANTIZATION}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A JSON file as people read it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_back(folder: Path) -> DeepseekV3ForCausalLM:
    """The exported weights, dequantised, in transformers' plain class."""
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary)
        save_file(dequantised(load_file(folder / "model.safetensors")), plain / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        del config["quantization_config"]
        write_json(plain / "config.json", config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert isinstance(model, DeepseekV3ForCausalLM)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    return model


def complete(model: Any, folder: Path, question: str) -> str:
    """The greedy answer to one question, through the exported tokenizer and chat template."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    output = model.generate(ids, max_new_tokens=96, do_sample=False)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def measure(model: DeepseekV3ForCausalLM, rows: dict[Kind, Tensor]) -> tuple[dict[str, float], dict[str, list[Tensor]]]:
    """Held-out loss and expert loads of each MoE layer, by kind and over all held-out text ("all")."""
    balancer = LoadBalancer(model)
    losses: dict[str, float] = {}
    loads: dict[str, list[Tensor]] = {}
    for kind, part in rows.items():
        losses[kind] = mean_loss(model, part)
        loads[kind] = balancer.take_loads()
    losses["all"] = sum(losses[kind] * len(part) for kind, part in rows.items()) / sum(map(len, rows.values()))
    loads["all"] = [sum(layer, torch.zeros_like(layer[0])) for layer in zip(*loads.values(), strict=True)]
    return losses, loads


def export(work_dir: Path, output: Path) -> Figures:
    """Write the folder, load it back, and return the measured figures."""
    data = prepare(work_dir)
    saved: dict[str, Any] = torch.load(work_dir / "checkpoint.pt", weights_only=True)
    model = build_model(demo_config(data.tokenizer.get_vocab_size()))
    model.load_state_dict(saved["model"])
    output.mkdir(parents=True, exist_ok=True)
    save_file(quantised(per_expert(model.state_dict())), output / "model.safetensors", {"format": "pt"})
    (output / "model.safetensors").chmod(0o644)
    write_json(output / "config.json", deepseek_config(model.config))
    sampling = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.5, "top_p": 0.95}
    write_json(output / "generation_config.json", sampling)
    save_tokenizer(data.tokenizer, output, max_length=model.config.max_position_embeddings)

    rows = {kind: held_out_rows(text) for kind, text in data.held_out.items()}
    losses, _ = measure(model, rows)
    loaded = load_back(output)
    stored_losses, loads = measure(loaded, rows)
    ngrams = NgramModels(data.training, data.tokenizer.get_vocab_size())
    counted: dict[str, tuple[float, float]] = {kind: ngrams.losses(part) for kind, part in rows.items()}
    counted["all"] = ngrams.losses(torch.cat(list(rows.values())))
    return Figures(
        progress=Progress(**saved["progress"]),
        python=platform.python_version(),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        training={kind: text.num_tokens for kind, text in data.training.items()},
        core=data.core.num_tokens,
        held_out_tokens=sum(part.numel() - len(part) for part in rows.values()),
        bytes_per_token={kind: text.num_bytes / text.num_tokens for kind, text in data.held_out.items()},
        unigram={name: unigram for name, (unigram, _) in counted.items()},
        bigram={name: bigram for name, (_, bigram) in counted.items()},
        loss=losses["all"],
        stored_losses=stored_losses,
        loads={part: describe_loads(counts) for part, counts in loads.items()},
        answer=complete(loaded, output, "What does os.path.join do?"),
    )


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="the folder that train.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = export(options.work_dir, options.output)
    card = model_card(figures)
    (options.output / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
