"""CTranslate2's side of generation, on a CPU and as many threads. It is not a dependency."""

import time
from types import SimpleNamespace
from typing import Any

import ctranslate2

from tests.bench import Timing, Work, read_ids

CONVERTED = "ctranslate2"  # a folder in that of the model
DTYPES = ctranslate2.get_supported_compute_types("cpu")  # of this processor


def run(work: Work) -> Timing:
    model = f"{work.folder}/{CONVERTED}"
    generator = ctranslate2.Generator(model, compute_type=work.dtype, intra_threads=work.threads)
    prompts = [[str(token) for token in ids] for ids in read_ids(work)]
    started = time.perf_counter()
    results = generator.generate_batch(
        prompts, max_batch_size=work.batch_size, max_length=work.new_tokens, beam_size=work.num_beams,
        end_token=str(work.eos), return_end_token=True, include_prompt_in_result=False,
    )  # fmt: skip
    completions = [result.sequences_ids[0] for result in results]
    return Timing(time.perf_counter() - started, sum(map(len, completions)), completions)


class Converter(ctranslate2.converters.TransformersConverter):
    """Converts a model with a vocabulary in which the token of an id is its digits: any tokenizer will do."""

    def load_model(self, *arguments: Any, **options: Any) -> Any:
        model = super().load_model(*arguments, **options)
        self.size = model.config.vocab_size
        return model

    def load_tokenizer(self, *_: Any, **__: Any) -> Any:
        vocabulary = {str(number): number for number in range(self.size)}
        return SimpleNamespace(get_vocab=lambda: vocabulary, bos_token="2", eos_token="2", unk_token="3")


def convert(folder: str) -> None:
    """Write the model in CTranslate2's format into its folder."""
    Converter(folder).convert(f"{folder}/{CONVERTED}")
