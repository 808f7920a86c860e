"""Score tables as HTML and as LaTeX: the cells of `render`, with the numbers behind them. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from cvlctl.score.render import NAMES, best_of, columns, notes
from cvlctl.score.rows import Record
from cvlctl.terminal import visible

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}",
}  # fmt: skip
_AGAIN, _NUMBER = ' class="again"', ' class="n"'


def html(text: object) -> str:
    """Text out of files as HTML: nothing in it is markup, and control characters are spelt out."""
    return escape(visible(str(text).replace("\n", " ")))


def to_html(records: Sequence[Record], caption: str = "") -> str:
    """A table whose cells carry their numbers (`data-v`), by which a page can sort it; its notes are a list below."""
    shown, best = columns(records), best_of(records)
    head = "".join(f'<th scope="col"{_aligned(key)}>{html(heading)}</th>' for key, heading, _ in shown)
    lines = [f"<tr>{''.join(_cell(records, i, key, cells[i], (i, key) in best) for key, _, cells in shown)}</tr>"
             for i in range(len(records))]  # fmt: skip
    title = f"<caption>{html(caption)}</caption>" if caption else ""
    table = f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    below = "".join(f"<li>{html(note)}</li>" for note in notes(records))
    return f'<div class="scroll">{table}</div>' + (f'<ul class="notes">{below}</ul>' if below else "")


def _cell(records: Sequence[Record], i: int, key: str, text: str, best: bool) -> str:
    value = records[i].get(key)
    if key in NAMES:
        again = key == "task" and i > 0 and records[i - 1].get(key) == value
        return f"<td{_AGAIN if again else ''}>{html(text)}</td>"
    number, bracket, interval = text.partition(" [")
    shown = html(number) + (f' <span class="ci">[{html(interval)}</span>' if bracket else "")
    sortable = f' data-v="{value!r}"' if isinstance(value, int | float) else ""
    return f"<td{_NUMBER}{sortable}>{f'<b>{shown}</b>' if best else shown}</td>"


def _aligned(key: str) -> str:
    return "" if key in NAMES else _NUMBER


def to_latex(records: Sequence[Record], caption: str = "") -> str:
    """A table for LaTeX with the package booktabs; a rule between tasks, the best scores bold, its notes below."""
    shown, best = columns(records), best_of(records)
    lines = [r"\begin{table}", r"\centering"]
    lines += [rf"\caption{{{latex(caption)}}}"] if caption else []
    lines += [rf"\begin{{tabular}}{{{''.join('l' if key in NAMES else 'r' for key, _, _ in shown)}}}", r"\toprule"]
    lines += [" & ".join(latex(heading) for _, heading, _ in shown) + r" \\", r"\midrule"]
    for i, record in enumerate(records):
        if i > 0 and record.get("task") != records[i - 1].get("task"):
            lines.append(r"\addlinespace")
        texts = [(latex(cells[i]), (i, key) in best) for key, _, cells in shown]
        line = " & ".join(rf"\textbf{{{text}}}" if bold else text for text, bold in texts)
        lines.append(line + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", *(rf"\par\footnotesize {latex(note)}" for note in notes(records))]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def latex(text: str) -> str:
    """Text as LaTeX prints it, also behind a line's end, which would take [a] for a length and * for a part of it."""
    shown = "".join(_LATEX.get(sign, sign) for sign in visible(text.replace("\n", " ")))
    return f"{{}}{shown}" if shown.startswith(("[", "*")) else shown
