"""A sheet of figures, which can be printed to a terminal, in Markdown and in LaTeX."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\|*_`<["})
_LATEX = str.maketrans({
    **{c: f"\\{c}" for c in "&%$#_{}"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$", "±": r"$\pm$",
    "*": "{*}", "[": "{[}",  # directly after \\ of the row above, LaTeX would read them as its arguments
    "-": "{-}",              # -- would become a dash
})


@dataclass(frozen=True)
class TableCell:
    """The text of a cell, in bold if it is the best of its column."""

    text: str = ""
    best: bool = False


@dataclass(frozen=True)
class Sheet:
    """A title, headings in two levels, and rows with a cell per heading."""

    title: str
    headings: tuple[tuple[str, str], ...]
    """(group, heading) of every column, "" for none; adjacent columns of one group share the group's heading.
    The first column and columns without a heading hold words, the others figures."""
    rows: tuple[tuple[TableCell, ...], ...]
    """A row whose first cell is empty belongs to the row above."""

    @staticmethod
    def of(title: str, columns: Iterable[tuple[tuple[str, str], Sequence[TableCell]]]) -> "Sheet":
        """Make a sheet from ((group, heading), cells) of every column, leaving out columns without text."""
        kept = [(heading, cells) for heading, cells in columns if any(cell.text for cell in cells)]
        return Sheet(title, tuple(heading for heading, _ in kept),
                     tuple(zip(*(cells for _, cells in kept), strict=True)))

    def rich(self) -> Table:
        """Return the sheet for table.print_table: a narrow terminal folds names, never figures."""
        table = Table(title=Text(self.title), title_style="bold", title_justify="left", box=box.SIMPLE_HEAD,
                      pad_edge=False, padding=(0, 1, 0, 0))
        grouped = any(group for group, _ in self.headings)
        for i, (group, heading) in enumerate(self.headings):
            first = i == 0 or self.headings[i - 1][0] != group
            head = Text(f"{group if first else ''}\n{heading}" if grouped else heading)
            width = max(len(text) for text in (heading, *(row[i].text for row in self.rows)))
            table.add_column(head, justify="left" if self._words(i) else "right", no_wrap=i > 0,
                             min_width=width if i else None)
        for block in self._blocks():
            for row in block:
                table.add_row(*(Text(cell.text, "bold" if cell.best else "") for cell in row))
            if len(block) > 1:
                table.add_section()
        return table

    def markdown(self) -> str:
        """Return the title and a table in GitHub's Markdown; columns are headed by group and heading."""

        def cell(text: str, bold: bool) -> str:
            return f"**{text.translate(_MARKDOWN)}**" if bold else text.translate(_MARKDOWN)

        heads = [cell(f"{group} {heading}".strip(), False) for group, heading in self.headings]
        rule = [":---" if self._words(i) else "---:" for i in range(len(heads))]
        rows = [[cell(c.text, c.best) for c in row] for row in self.rows]
        lines = [f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows)]
        return "\n".join([cell(self.title, True), "", *lines]) + "\n"

    def latex(self) -> str:
        r"""Return the sheet as a table* environment; the document needs \usepackage{booktabs}."""
        lines = []
        groups, rules, at = [], "", 1
        for group, shared in itertools.groupby(group for group, _ in self.headings):
            n = len(list(shared))
            groups += [rf"\multicolumn{{{n}}}{{c}}{{{_latex(group)}}}"] if group else [""] * n
            rules += rf"\cmidrule(lr){{{at}-{at + n - 1}}}" if group else ""
            at += n
        if rules:
            lines += [" & ".join(groups) + r" \\", rules]
        lines += [" & ".join(_latex(heading) for _, heading in self.headings) + r" \\", r"\midrule"]
        for i, block in enumerate(self._blocks()):
            lines += [r"\addlinespace"] if i and len(block) > 1 else []
            for row in block:
                lines.append(" & ".join(rf"\textbf{{{_latex(c.text)}}}" if c.best else _latex(c.text)
                                        for c in row) + r" \\")
        kinds = "".join("l" if self._words(i) else "r" for i in range(len(self.headings)))
        return "\n".join([r"\begin{table*}", r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
                          rf"\caption{{{_latex(self.title)}}}", rf"\begin{{tabular}}{{{kinds}}}",
                          r"\toprule", *lines, r"\bottomrule", r"\end{tabular}", r"\end{table*}"]) + "\n"

    def _words(self, i: int) -> bool:
        """Whether column i holds words."""
        return i == 0 or not self.headings[i][1]

    def _blocks(self) -> Iterator[list[tuple[TableCell, ...]]]:
        """Return the rows in blocks, each a row with a name and the rows that belong to it."""
        starts = [i for i, row in enumerate(self.rows) if i == 0 or row[0].text]
        return (list(self.rows[a:b]) for a, b in itertools.pairwise([*starts, len(self.rows)]))


def _latex(text: str) -> str:
    return re.sub(r"^\{-\}(?=\d)", "$-$", text.translate(_LATEX))  # a minus before a number, not a hyphen
