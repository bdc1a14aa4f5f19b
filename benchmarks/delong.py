"""How often DeLong's test of two equally good classifiers says that they differ, with several slides a patient.

    python benchmarks/delong.py [--draws 2000] [--out FILE.md]

Two classifiers with the same true AUC score the slides of 130 patients, half of them positive. A score is the label,
plus an effect of the patient, plus one of the slide; the patient's share of the variance is the intraclass correlation.
Both effects are drawn anew for each classifier, so that the null hypothesis is true. The nominal rate is 5 %.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from machine import machine, publish

from mil.results.intervals import delong

PATIENTS, LEVEL = 130, 0.05
CASES = ((1, 0.7), (2, 0.7), (5, 0.0), (5, 0.3), (5, 0.7), (5, 0.9))
"""Most slides a patient (from 1, uniformly), and the intraclass correlation."""


def one_draw(most_slides: int, correlation: float, rng: np.random.Generator) -> tuple[bool, bool]:
    """Whether the test rejects: slides as independent, patients as clusters."""
    patient_S = np.repeat(np.arange(PATIENTS), rng.integers(1, most_slides + 1, PATIENTS))
    label_S = patient_S % 2
    of_patient_2S = rng.normal(size=(2, PATIENTS))[:, patient_S]
    of_slide_2S = rng.normal(size=(2, len(patient_S)))
    score_2S = label_S + np.sqrt(correlation) * of_patient_2S + np.sqrt(1 - correlation) * of_slide_2S
    p_a_S, p_b_S = 1 / (1 + np.exp(-score_2S))
    tests = delong(label_S, p_a_S, p_b_S), delong(label_S, p_a_S, p_b_S, patient_S.astype(str).tolist())
    rejected = [test is not None and test.p_value is not None and test.p_value < LEVEL for test in tests]
    return rejected[0], rejected[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = [
        "| slides a patient | intraclass correlation | slides as independent | patients as clusters |",
        "| --- | --- | --- | --- |",
    ]
    for number, (most_slides, correlation) in enumerate(CASES):
        rng = np.random.default_rng([0, number])
        draws = [one_draw(most_slides, correlation, rng) for _ in range(options.draws)]
        before, after = (100 * np.mean([draw[k] for draw in draws]) for k in (0, 1))
        slides = "1" if most_slides == 1 else f"1 to {most_slides}"
        lines.append(f"| {slides} | {correlation} | {before:.1f} % | {after:.1f} % |")
    error = 100 * np.sqrt(LEVEL * (1 - LEVEL) / options.draws)
    text = "\n".join(
        [
            "# DeLong's test under a true null hypothesis: how often p is below 0.05",
            "",
            *lines,
            "",
            f"- {options.draws} draws a row; standard error of a true 5 %: {error:.1f} percentage points",
            f"- Command: `{' '.join(['python benchmarks/delong.py', *sys.argv[1:]])}`",
            f"- Machine: {machine('numpy', 'scipy')}",
        ]
    )
    publish(text, options.out)


if __name__ == "__main__":
    main()
