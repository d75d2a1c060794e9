"""What a label-ranking task is: its labels, its question and its content-free inputs. CreditMix is the built-in one."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LabelTask:
    """A fixed label set and the question that is put to the model.

    Attributes:
        name: short name, part of file names (`<name>_sft.jsonl`).
        labels: the answers, in the order every table and matrix uses.
        instruction: the text before the features in every prompt.
        null_inputs: content-free features whose scores are the prior.
        verbalizers: further surface forms per label, e.g. {"Standard": ["Average"]}.
    """

    name: str
    labels: tuple[str, ...]
    instruction: str
    null_inputs: tuple[str, ...]
    verbalizers: dict[str, list[str]] = field(default_factory=dict)

    def prompt(self, text: str) -> str:
        """The user turn for one row's features; prepare, train, infer, eval and serve all build it here."""
        return f"{self.instruction}\n\n{text}"

    def surface_forms(self, label: str) -> list[str]:
        """The strings that count as `label`: it and its verbalizers, each with and without a leading space."""
        words = [label, *self.verbalizers.get(label, [])]
        return [form for word in words for form in (word, " " + word)]


CREDITMIX = LabelTask(
    name="creditmix",
    labels=("Good", "Standard", "Bad"),
    instruction=("Classify the credit mix of this customer as Good, Standard or Bad. Return only the label."),
    null_inputs=(
        "N/A",
        "Unknown",
        "No information.",
        "Age: N/A, Occupation: N/A, Annual Income: N/A, Outstanding Debt: N/A, "
        "Credit Utilization Ratio: N/A, Payment Behaviour: N/A",
        "Age: , Occupation: , Annual Income: , Outstanding Debt: , Credit Utilization Ratio: , Payment Behaviour: ",
    ),
)
