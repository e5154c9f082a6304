"""The reference's side of generation: `generate` of transformers."""

import torch
import transformers

from tests.bench import Timing, Work, read_ids
from tests.bench.clock import now
from tests.reference import padded

PAD = 1


def run(work: Work) -> Timing:
    """Generate in batches, in the order of the prompts, each padded on the left to its longest one."""
    dtype = getattr(torch, work.dtype)
    model = transformers.OPTForCausalLM.from_pretrained(work.folder, dtype=dtype, local_files_only=True)
    model.to(work.device).eval()
    model.generation_config = transformers.GenerationConfig(eos_token_id=work.eos, pad_token_id=PAD)
    prompts, completions = read_ids(work), list[list[int]]()
    started = now(work.device)
    for start in range(0, len(prompts), work.batch_size):
        batch = padded(prompts[start : start + work.batch_size], side="left")
        inputs = {name: tensor.to(work.device) for name, tensor in batch.items()}
        rows = model.generate(**inputs, max_new_tokens=work.new_tokens, num_beams=work.num_beams, do_sample=False)
        for ids in rows[:, inputs["input_ids"].shape[1] :].tolist():  # after its EOS, a row is padded
            completions.append(ids[: ids.index(work.eos) + 1] if work.eos in ids else ids)
    return Timing(now(work.device) - started, sum(map(len, completions)), completions)
