"""The page of ``fairseq-adaptive explore``: streamlit runs this file at every change of a widget."""

import html

import pandas
import streamlit as st

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.explore import served
from fairseq_adaptive.printable import printable
from fairseq_adaptive.report.compute_table import short
from fairseq_adaptive.report.shading import to_fragment

SHARE = "compute share"
LIKENESS = {
    True: ("probability", "Probability: of the label that all policies off give"),
    False: ("likeness", "Likeness: share of the words that are those with all policies off"),
}
EXAMPLES = {
    "label": "what is to be labelled",
    "translation": "what is to be translated",
    "continuation": "how it begins",
}


# streamlit has one theme for screen and paper: a dark page is printed with its lightness turned round, but not the shades
ON_PAPER = (
    "<style>@media print and (prefers-color-scheme:dark){.stApp{filter:invert(1) hue-rotate(180deg)}"
    ".shaded [class^=depth] i,.shaded [class^=count] i{filter:invert(1) hue-rotate(180deg)}}</style>"
)


def ask(explorer):
    """The form; what was chosen, once it was sent."""
    with st.form("form"):
        text = st.text_area("Text", placeholder=EXAMPLES[explorer.kind], height=120)
        other = st.text_area("Second text", height=80) if explorer.pairs else ""
        columns, beam, words, value = st.columns(2), 1, 20, None
        if explorer.kind != "label":
            beam = columns[0].slider("Beam", 1, 20, 5)
        if explorer.kind == "continuation":
            words = columns[1].slider("Tokens of the continuation", 1, 100, 20)
        names = ["as trained", *(each.name for each in explorer.dials)] + [SHARE] * bool(explorer.dials)
        chosen = names[0]
        if explorer.dials:
            dials = st.columns(2)
            chosen = dials[0].selectbox(
                "Dial", names, help="; ".join(f"{each.name}: {each.help}" for each in explorer.dials)
            )
            value = dials[1].slider("Its value", 0.01, 1.0, 0.5, 0.01, help="is not read where the dial is as trained")
        curve = st.checkbox("Draw the curve over the dial", value=True) if explorer.dials else False
        sent = st.form_submit_button("Run", type="primary")
    if sent:
        st.session_state.asked = (text, other, beam, words, chosen, value, curve)
    return st.session_state.get("asked")


def show(explorer, asked):
    text, other, beam, words, chosen, value, curve = asked
    given = {"other": other, "beam": beam, "words": words}
    dial = next((each for each in explorer.dials if each.name == chosen), None)
    points, drawn = [], dial or (explorer.dials[0] if explorer.dials else None)
    if drawn is not None and (curve or chosen == SHARE):
        bar = st.progress(0.0, f"the curve over the {drawn.name}")
        points = explorer.curve(text, drawn, progress=bar.progress, **given)
        bar.empty()
    note = ""
    if chosen == SHARE:
        fitting = [point for point in points if point.share <= value] or [min(points, key=lambda point: point.share)]
        best = max(fitting, key=lambda point: point.share)
        dial, value = drawn, best.value
        note = (
            f"The {drawn.name} {best.value:g} takes {best.share:.0%} of the multiply-adds of full depth on this text."
        )
    look = explorer.look(text, dial=dial, value=value if dial else None, **given)
    st.subheader(explorer.kind.capitalize(), anchor=False)
    st.html(said(look.said))
    st.subheader("What each token took", anchor=False)
    for name, sentence in look.sentences.items():
        if len(look.sentences) > 1:
            st.caption(name)
        st.html(to_fragment([sentence._replace(label=None, probability=None)]))
    if look.tape is not None:
        st.caption(f"{look.tape} tape tokens were read.")
    st.subheader("What it cost", anchor=False)
    st.html(costs(look, explorer.adaptive))
    if note:
        st.caption(note)
    if points:
        st.subheader(f"Over the {drawn.name}", anchor=False)
        likeness, meaning = LIKENESS[explorer.kind == "label"]
        frame = pandas.DataFrame(
            {
                drawn.name: [point.value for point in points],
                "multiply-adds": [point.share for point in points],
                likeness: [point.likeness for point in points],
            }
        )
        st.line_chart(frame, x=drawn.name, y=[*frame.columns[1:]], height=280)
        st.caption(f"{drawn.name}: {drawn.help}. Multiply-adds: share of those with all policies off. {meaning}.")


def said(found) -> str:
    """Labels or texts with their probabilities, as a table; escaped."""
    rows = "".join(
        f"<tr><td>{html.escape(printable(text))}</td><td>{'' if chance is None else f'{chance:.3g}'}</td></tr>"
        for text, chance in found[:10]
    )
    return (
        "<style>.said{border-collapse:collapse}.said td{padding:.15em .8em .15em 0;vertical-align:top;overflow-wrap:anywhere}"
        ".said tr:first-child{font-weight:600}.said td:last-child{font-variant-numeric:tabular-nums;opacity:.75}</style>"
        f'<table class="said">{rows}</table>'
    )


def costs(look, adaptive: bool) -> str:
    """Multiply-adds and time beside those of the counterpart."""
    rows = [
        ("multiply-adds", *map(short, look.macs), look.macs),
        ("time, ms", *(f"{1000 * each:.1f}" for each in look.seconds), look.seconds),
    ]
    cells = "".join(
        f"<tr><th>{name}</th><td>{own}</td>"
        + (f"<td>{dense}</td><td>{pair[0] / pair[1]:.2f}</td>" if adaptive and pair[1] else "")
        + "</tr>"
        for name, own, dense, pair in rows
    )
    head = (
        "<tr><th></th><th>this model</th>" + ("<th>all policies off</th><th>ratio</th>" if adaptive else "") + "</tr>"
    )
    return (
        "<style>.costs{border-collapse:collapse;font-variant-numeric:tabular-nums}"
        ".costs th,.costs td{padding:.15em .8em .15em 0;text-align:right;font-weight:400}"
        ".costs th:first-child{text-align:left}.costs tr:first-child th{opacity:.75}</style>"
        f'<table class="costs">{head}{cells}</table>'
    )


def main():
    explorer = served.explorer
    st.set_page_config(page_title=f"{explorer.kind} by {explorer.title}")
    st.html(ON_PAPER)
    st.title(explorer.title, anchor=False)
    st.caption(explorer.description)
    asked = ask(explorer)
    if asked is None:
        return
    try:
        with st.spinner("running"):
            show(explorer, asked)
    except UsageError as error:
        st.html(f"<p role='alert'>{html.escape(str(error))}</p>")


main()
