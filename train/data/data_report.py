"""What became of a source of training data, to be read before training starts."""

from __future__ import annotations

from dataclasses import dataclass, fields

from longctx.errors import printable

from .conversations import REASONS

__all__ = ["COUNTS", "DataReport"]


@dataclass(frozen=True, slots=True)
class DataReport:
    """What became of a source. Counts of tokens are of rendered conversations."""

    source: str
    """File, folder or hub id."""
    max_length: int
    """Most tokens of a sample."""
    conversations: int
    """Records read; plain texts count as well."""
    untaught: int
    """Conversations of which nothing is left to learn from."""
    continued: int
    """Conversations that became more than one sample."""
    samples: int
    """Rows for the trainer."""
    tokens: int
    """Of all conversations before any is cut."""
    kept: int
    """Of all samples."""
    supervised: int
    """Of those, tokens that are learnt: with a label, and something before them to predict it."""
    dropped: int
    """Left out because of the length."""
    cut: int
    """Conversations or texts cut wherever max_length fell."""
    unsupervised: int
    """Cut samples left out because no answer began in them."""
    too_long: int
    """Exchanges longer than max_length on their own, left out."""
    leading: int
    """Turns left out: answers before any question."""
    unanswered: int
    """Turns left out: questions without an answer after them."""
    out_of_order: int
    """Turns left out: answers without a question before them."""
    misplaced_system: int
    """Turns left out: system turns that are not the first."""
    stray_tool: int
    """Turns left out: results of tools that belong to no answer."""
    blank: int
    """Turns left out: empty, or the counterpart of an empty one."""
    special: int
    """Turns left out: they spell a special token, or are the counterpart of one that does."""
    masked: int
    """Answers that are context only, as their weight of 0 says."""
    single: int
    """Conversations that became a sample per answer: the template writes an answer otherwise once
    another follows. Their tokens are those of all samples."""
    unwritten: int
    """Conversations left out: the template does not write the tools that they use."""
    refused: int
    """Conversations left out under skip_bad: the template fails, or strict refuses them."""
    notes: tuple[str, ...] = ()
    """What the reader had to say: a salvaged file, a report of the beginning alone."""

    @property
    def repeated(self) -> int:
        """Tokens that stand in more than one sample: system turns of conversations that go on."""
        return self.kept + self.dropped - self.tokens

    def __str__(self) -> str:
        """Write a few lines for the terminal."""
        share = self.supervised / self.kept if self.kept else 0
        lines = [
            f"{self.source}: {self.conversations:,} conversations → {self.samples:,} samples of "
            f"up to {self.max_length:,} tokens",
            f"  tokens: {self.kept:,} kept, {self.dropped:,} dropped for length, "
            f"{self.supervised:,} supervised ({share:.0%} of those kept)",
        ]
        if self.repeated:
            lines[1] += f", {self.repeated:,} in more than one sample"
        lengths = {
            "went on in further samples": self.continued,
            "cut at max_length": self.cut,
            "samples left out, no answer began in them": self.unsupervised,
            "exchanges left out, too long on their own": self.too_long,
        }
        if any(lengths.values()):
            said = "; ".join(f"{count:,} {what}" for what, count in lengths.items() if count)
            lines.append(f"  over-length: {said}")
        for count, what in (
            (self.single, "conversations became a sample for each answer, as the template has it"),
            (self.masked, "answers are context only (weight 0)"),
            (self.unwritten, "conversations left out, the template does not write their tools"),
            (self.refused, "conversations left out, refused by the template or by strict"),
        ):
            lines += [f"  {count:,} {what}"] * bool(count)
        if self.untaught:
            lines.append(f"  conversations left out: {self.untaught:,}, no answered question")
        turns = {what: getattr(self, reason) for reason, what in REASONS.items()}
        lines += [f"  turns left out: {n:,} × {what}" for what, n in turns.items() if n]
        return printable("\n".join([*lines, *(f"  {note}" for note in self.notes)]))


COUNTS = tuple(
    field.name
    for field in fields(DataReport)
    if field.name not in ("source", "max_length", "notes")
)
"""The counts of a report in order: the column "counts" of an encoded row, whose sum they are."""
