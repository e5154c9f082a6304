"""The reference's side of BLEU: sacreBLEU."""

import time

import sacrebleu

from minift.files.datasets import load_rows
from tests.bench import Timing, Work


def run(work: Work) -> Timing:
    references = [row["output"] for row in load_rows(work.data)]
    hypotheses = references[1:] + references[:1]
    started = time.perf_counter()
    sacrebleu.corpus_bleu(hypotheses, [references])
    return Timing(time.perf_counter() - started, len(references))
