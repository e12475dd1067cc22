"""A finished run's results, shaped like those of the default model, for tests of the report."""

from __future__ import annotations

from dataclasses import replace

from nha.report import Check, Cost, Results, Sample, Tuning, Variant
from nha.report.results import Distilled, RecallAt

EDGES = [0, 64, 128, 256, 512, 1024, 2048]


FULL_LAYERS = (8, 18, 20, 23)


def results() -> Results:
    """Results with every variant, costs at six context lengths and one pair of texts."""
    variants = [
        Variant("teacher", 21.1, 0.03, [38.2, 27.4, 24.0, 21.9, 19.8, 17.9], 754_974_720),
        Variant("untuned", 25.9, 0.03, [38.2, 29.5, 27.8, 26.3, 24.9, 24.0]),
        Variant("all_hybrid", 27.9, 0.03, [38.2, 30.9, 29.9, 28.7, 27.4, 26.9], 4_432_560),
        Variant("hybrid", 24.2, 0.03, [38.2, 28.9, 27.1, 24.6, 23.2, 22.3], 104_504_000),
        Variant("slots_off", 26.1, 0.03, [38.2, 29.9, 28.8, 27.0, 25.6, 25.1]),
        Variant("longer_window", 23.7, 0.03, [38.2, 28.2, 26.5, 24.2, 22.8, 22.0]),
        Variant("window_off", 1893.0, 0.05, [2010.0, 1900.0, 1880.0, 1850.0, 1870.0, 1890.0]),
    ]
    costs = [
        Cost(n, n * 46_080, 3_841_000 + n * 6_144, teacher_ms=24 + n * 0.0062, hybrid_ms=41.0 + n * 0.0008)
        for n in (512, 1024, 2048, 4096, 8192, 16384)
    ]
    samples = [
        Sample(
            "A short question",
            "What is the capital of France, and why is it famous?",
            42,
            "The capital of France is Paris. It is famous for the Eiffel Tower & its museums.",
            "The capital of France is Paris. It is famous for <b>art</b>, food and the Eiffel Tower.",
        ),
        Sample("Going on with a long document", "... the statement", 1024, "is executed.", "is evaluated."),
    ]
    return Results(
        model="SmolLM2-135M-Instruct",
        source="smollm2",
        layers=30,
        parameters=134_515_008,
        added_parameters=3_400_000,
        window_sizes=[-1 if layer in FULL_LAYERS else 64 for layer in range(30)],
        num_slots=64,
        num_sinks=1,
        document="the Python language reference",
        documents=4,
        document_tokens=2048,
        bucket_edges=EDGES,
        variants=variants,
        costs=costs,
        samples=samples,
        checks=[
            Check("same model inside the window", True, "logits of 64 tokens equal the original's bit for bit"),
            Check("hybrid layers do not grow", True, "4,432,560 bytes after 96 and after 512 tokens"),
        ],
        seconds={"load": 34.0, "convert": 12.0, "measure": 120.0, "generate": 20.0},
        versions={"nha": "0.1.0", "torch": "2.13.0"},
        machine="2 CPU threads",
        seed=0,
        saved_to="report/hybrid",
        tuning=Tuning("gates and sinks", 20, 4096, 52.0, 25.9, 24.2),
    )


def distilled_results() -> Results:
    """Results of the distilled hybrid, which was asked for numbers at three distances."""
    counts = [(256, 2, 1, 1, 12, 12), (1024, 2, 0, 1, 9, 12), (8192, 2, 0, 0, 6, 12)]
    recall = [RecallAt(*one, bytes=21_000_000) for one in counts]
    packed = [replace(one, digits=one.digits - 1, bytes=5_900_000) for one in recall]
    relative = {"ppl_2k": 1.08, "cloze_near": 0.93, "cloze_far": 0.5}
    return replace(results(), tuning=None, distilled=Distilled(10_300_000, relative, recall, packed))
