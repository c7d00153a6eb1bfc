"""How a page looks: its colours, light and dark, and its rules."""

# name: (light, dark)
COLOURS = {
    "paper": ("#ffffff", "#16191f"),
    "ink": ("#1c2430", "#e4e8ee"),
    "soft": ("#5d6878", "#98a3b3"),
    "line": ("#dfe4ea", "#2d333d"),
    "run": ("#1769c2", "#6cb2ff"),
    "other": ("#c2570c", "#ffa657"),
    "good": ("#1a7f4b", "#56d08b"),
    "warn": ("#9a6200", "#e3b341"),
    "violet": ("#7446b8", "#b89cf5"),
    "pink": ("#b42d68", "#f58ab4"),
    "teal": ("#0d7580", "#4fcbd6"),
}
SERIES = ("run", "other", "good", "violet", "pink", "teal", "warn", "soft")  # of several runs, in order


def style() -> str:
    light, dark = (" ".join(f"--{name}: {values[i]};" for name, values in COLOURS.items()) for i in (0, 1))
    return f":root {{ color-scheme: light dark; {light} }}\n" + (
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{_RULES}"
    )


_RULES = """
* { box-sizing: border-box; }
html { background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%; }
body { margin: 0; font: 16px/1.6 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  "Liberation Sans", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: clamp(1.25rem, 4vw, 3.5rem) clamp(1rem, 4vw, 2rem) 5rem; }
h1 { font-size: clamp(1.9rem, 5vw, 2.6rem); line-height: 1.15; letter-spacing: -.02em; margin: 0; }
h2 { font-size: 1.3rem; letter-spacing: -.01em; margin: 0 0 .9rem; }
p { margin: 0 0 1rem; max-width: 46rem; }
section { margin-top: 2.5rem; padding-top: 2rem; border-top: 1px solid var(--line); }
.subtitle { color: var(--soft); margin: .4rem 0 1.4rem; font-size: .95rem; }
.verdict { font-size: clamp(1.1rem, 2.6vw, 1.3rem); line-height: 1.45; margin-bottom: 1.6rem; text-wrap: pretty; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin-top: 1.6rem; font-size: .9rem; }
a { color: var(--run); text-decoration: none; }
a:hover { text-decoration: underline; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
code { font-size: .88em; background: color-mix(in srgb, var(--ink) 7%, transparent); border-radius: .25em;
  padding: .1em .3em; overflow-wrap: anywhere; }
pre { font-size: .82rem; line-height: 1.5; overflow-x: auto; padding: 1rem; border: 1px solid var(--line);
  border-radius: .6rem; }
summary { cursor: pointer; color: var(--run); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); gap: .9rem; }
.card { border: 1px solid var(--line); border-radius: .75rem; padding: 1rem 1.15rem; }
.card .label { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: center; gap: .4rem;
  color: var(--soft); font-size: .88rem; }
.card .value { font-size: 2.1rem; line-height: 1.3; font-weight: 650; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.card .note { color: var(--soft); font-size: .88rem; line-height: 1.4; }
.badge { font-size: .72rem; font-weight: 600; line-height: 1.6; border-radius: 1rem; padding: 0 .6em;
  white-space: nowrap; }
.badge.good { color: var(--good); background: color-mix(in srgb, var(--good) 13%, transparent); }
.badge.warn { color: var(--warn); background: color-mix(in srgb, var(--warn) 13%, transparent); }
/* The shadow at an edge says that a table goes on there; it is covered where the table ends. */
.scroll { overflow-x: auto; margin: 0 0 1.2rem; background:
  linear-gradient(to right, var(--paper) 40%, transparent) left / 2rem 100% no-repeat local,
  linear-gradient(to left, var(--paper) 40%, transparent) right / 2rem 100% no-repeat local,
  linear-gradient(to right, var(--line), transparent) left / .8rem 100% no-repeat scroll,
  linear-gradient(to left, var(--line), transparent) right / .8rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .9rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th:first-child { padding-left: 0; }
th { font-weight: 500; }
thead th { color: var(--soft); font-size: .82rem; }
.numbers { width: 100%; }
.numbers td, .numbers thead th:not(:first-child) { text-align: right; white-space: nowrap; }
.facts th { color: var(--soft); white-space: nowrap; }
.facts td { overflow-wrap: anywhere; }
.strong th, .strong td { font-weight: 650; color: var(--run); }
.soft th, .soft td { color: var(--soft); }
.strong:has(+ .soft) th, .soft th { padding-left: 1.1rem; }
.narrow { max-width: 34rem; }
.lead td:nth-child(2) { font-weight: 650; color: var(--run); }
.facts.dense, .dense tbody, .dense th, .dense td { display: block; }
.dense tbody { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(13rem, 45%), 1fr)); gap: 0 1.4rem; }
.dense tr { border-bottom: 1px solid var(--line); padding: .5rem 0; }
.dense th, .dense td { border: 0; padding: 0; white-space: normal; }
.dense th { font-size: .82rem; }
.matrix td { max-width: 15rem; }
.matrix td, .matrix thead th { padding: .3rem .4rem; border: 0; min-width: 8.5rem; font-weight: 500; }
.matrix tbody th { color: var(--ink); vertical-align: middle; border: 0; padding-right: .6rem; }
.matrix thead th:first-child { min-width: 0; width: 1%; font-weight: 400; }
.matrix figure { margin: 0; }
.matrix { width: 100%; }
.matrix.plain figcaption { display: none; }
.matrix img { image-rendering: pixelated; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 1.2rem 1.6rem; }
.panels.three { grid-template-columns: repeat(auto-fill, minmax(min(16.5rem, 100%), 1fr)); }
.wide figure { max-width: 44rem; }
figure { margin: 0 0 1rem; min-width: 0; }
figure svg, figure img { display: block; width: 100%; height: auto; }
figure .scroll { margin: 0; }
figure .scroll svg { min-width: 36rem; }
figure img { border-radius: .4rem; }
figure svg text { font-family: inherit !important; }
figcaption { color: var(--soft); font-size: .85rem; line-height: 1.45; margin-top: .5rem; }
@media (max-width: 34rem) {
  .numbers td, .numbers th { padding: .4rem 0 .4rem .55rem; font-size: .8rem; line-height: 1.4; }
  .numbers th:first-child { padding-left: 0; }
  .numbers td, .numbers thead th:not(:first-child) { white-space: normal; }
  .facts th { white-space: normal; }
}
@media print { nav { display: none; } section { break-inside: avoid-page; } }
"""
