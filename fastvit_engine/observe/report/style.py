"""The style sheet of the report: light and dark, phone to paper."""

# Colour says whose figure it is (training, held-out images, averaged weights), the same in every chart.
STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfaf8; --card: #ffffff; --ink: #1b1d21; --soft: #62666e; --hair: #e5e2dc;
  --train: #2a6fdb; --eval: #c8590b; --ema: #0f8a68; --good: #0f8a68; --bad: #c62f3b; --track: #ece9e3;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131518; --card: #1b1e22; --ink: #e9e8e5; --soft: #9ba0a8; --hair: #2d3137;
    --train: #6ea8ff; --eval: #f2994a; --ema: #45c79c; --good: #45c79c; --bad: #ff7078; --track: #2a2e34;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
main { max-width: 1120px; margin: 0 auto; padding: clamp(1.25rem, 4vw, 3.5rem) clamp(1rem, 4vw, 2.5rem); }
h1, h2, h3, p, ul, figure, dl, dd { margin: 0; padding: 0; }
h1 { font-size: clamp(2rem, 6vw, 3rem); line-height: 1.1; letter-spacing: -0.025em; font-weight: 700; }
h2 { font-size: 1.3rem; letter-spacing: -0.012em; margin: 3.25rem 0 1rem; }
h2 + .note { margin: -0.75rem 0 1rem; }
h3 { font-size: 1rem; font-weight: 600; }
.over { color: var(--soft); margin-bottom: 0.4rem; display: flex; flex-wrap: wrap; gap: 0.25rem 0.75rem; }
.state { color: var(--good); font-weight: 600; }
.state.running { color: var(--eval); }
.lead { font-size: clamp(1.05rem, 2.2vw, 1.25rem); margin-top: 0.75rem; max-width: 46em; }
.soft, .note, .unit { color: var(--soft); }
.note { font-size: 0.875rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 9.5rem), 1fr)); gap: 1px;
  margin-top: 2rem; background: var(--card); border: 1px solid var(--hair); border-radius: 12px; overflow: hidden; }
.tiles > div { box-shadow: 0 0 0 1px var(--hair); padding: 1rem; }
.tiles dt { color: var(--soft); font-size: 0.875rem; }
.tiles dd { font-size: 1.3rem; line-height: 1.4; font-weight: 650; letter-spacing: -0.02em; white-space: nowrap; }
.tiles dd small { display: block; font-size: 0.8125rem; font-weight: 400; letter-spacing: 0; color: var(--soft);
  white-space: normal; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 0 3rem;
  margin-top: 1.5rem; font-size: 0.9375rem; }
.facts > div { display: grid; grid-template-columns: 8.5rem 1fr; gap: 0.75rem; padding: 0.45rem 0;
  border-bottom: 1px solid var(--hair); }
.facts dt { color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.25rem; }
.chart { background: var(--card); border: 1px solid var(--hair); border-radius: 12px; padding: 1rem 1.15rem;
  min-width: 0; break-inside: avoid; }
.chart figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 0.6rem; }
.chart .unit { font-size: 0.875rem; }
.chart > .note { margin-top: 0.6rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; list-style: none; font-size: 0.875rem; color: var(--soft); }
.legend b { color: var(--ink); font-weight: 600; }
.legend li::before { content: ""; display: inline-block; width: 1.1em; margin-right: 0.4em; vertical-align: 0.25em;
  border-top: 2.5px solid var(--line); }
.legend li.dashed::before { border-top-style: dashed; border-top-width: 2px; }
.train { --line: var(--train); } .eval { --line: var(--eval); } .ema { --line: var(--ema); }
.plot { display: grid; grid-template-columns: calc(var(--label) + 0.5rem) 1fr; grid-template-rows: 13rem 1.3rem auto;
  margin: 0.9rem 0.9rem 0 0; font-size: 0.75rem; color: var(--soft); }
.plot svg { width: 100%; height: 100%; display: block; overflow: visible; }
.plot path { fill: none; vector-effect: non-scaling-stroke; }
.grid { stroke: var(--hair); stroke-width: 1px; shape-rendering: crispEdges; }
.line { stroke: var(--line); stroke-width: 2px; stroke-linejoin: round; stroke-linecap: round; }
.line.raw { stroke-width: 1px; opacity: 0.33; }
.line.dashed { stroke-dasharray: 5 4; stroke-width: 1.75px; }
.point { stroke: var(--line); stroke-width: 5px; stroke-linecap: round; }
.mark { stroke: var(--line); stroke-width: 1.25px; }
.mark.rewind { --line: var(--bad); stroke-dasharray: 4 3; }
.mark.restart { --line: var(--soft); stroke-dasharray: 2 3; }
.mark.checkpoint { --line: var(--soft); }
.legend li.mark::before { width: 0; height: 0.95em; margin: 0 0.55em 0 0.3em; vertical-align: -0.12em;
  border-top: 0; border-left: 2px dashed var(--line); }
.legend li.mark.checkpoint::before { height: 0.45em; vertical-align: 0; border-left-style: solid; }
.rows, .columns { position: relative; line-height: 1; }
.rows span { position: absolute; right: 0.5rem; transform: translateY(-50%); white-space: nowrap; }
.columns { grid-column: 2; }
.columns span { position: absolute; top: 0.45rem; transform: translateX(-50%); white-space: nowrap; }
.axis { grid-column: 2; text-align: right; margin-right: -0.9rem; line-height: 1.2; }
.events { width: 100%; border-collapse: collapse; font-size: 0.875rem; line-height: 1.4; }
.events th { text-align: left; font-weight: 400; color: var(--soft); }
.events th, .events td { padding: 0.4rem 1rem 0.4rem 0; vertical-align: top; border-bottom: 1px solid var(--hair); }
.events .when, .events .what, .events .step { white-space: nowrap; }
.events .when, .events .who { color: var(--soft); }
.events .who { min-width: 9rem; }
.events .what { font-weight: 600; }
.events .step { text-align: right; }
.events th:nth-child(3) { text-align: right; }
.events tr > :last-child { padding-right: 0; }
.events .bad .what { color: var(--bad); }
.events .notable .what { color: var(--eval); }
.events .plain .what { font-weight: 400; }
details .events { margin: 0 1.15rem 1rem; width: calc(100% - 2.3rem); }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15.5rem), 1fr)); gap: 0.9rem;
  list-style: none; }
.sample { display: grid; grid-template-columns: 5.5rem 1fr; gap: 0.85rem; background: var(--card); font-size: 0.8125rem;
  border: 1px solid var(--hair); border-radius: 12px; padding: 0.75rem; break-inside: avoid; min-width: 0; }
.sample.wrong { border-color: var(--bad); box-shadow: inset 0 0 0 1px var(--bad); }
.sample img { width: 5.5rem; height: 5.5rem; object-fit: contain; border-radius: 6px; background: var(--track);
  display: block; }
.sample img.small { image-rendering: pixelated; }
.sample .verdict { font-size: 0.9375rem; font-weight: 600; line-height: 1.3; color: var(--good); }
.sample.wrong .verdict { color: var(--bad); }
.sample .truth { color: var(--soft); line-height: 1.3; }
.guesses { list-style: none; grid-column: 1 / -1; }
.guesses li { display: grid; grid-template-columns: 5.5rem minmax(0, 1fr) 3.6em; gap: 0.85rem; align-items: center;
  line-height: 1.4; color: var(--soft); }
.guesses li.true { color: var(--ink); font-weight: 600; }
.guesses .name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.guesses .share { text-align: right; white-space: nowrap; }
.bar { height: 0.4rem; border-radius: 0.2rem; background: var(--track); overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--soft); }
.true .bar i { background: var(--good); }
details { background: var(--card); border: 1px solid var(--hair); border-radius: 12px; margin-top: 0.75rem; }
summary { padding: 0.8rem 1.15rem; font-weight: 600; cursor: pointer; }
pre { margin: 0; padding: 0 1.15rem 1rem; font: 0.8125rem/1.55 ui-monospace, "SF Mono", Menlo, Consolas,
  "Liberation Mono", monospace; white-space: pre-wrap; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--hair); color: var(--soft);
  font-size: 0.875rem; }
@media (max-width: 44rem) {
  .events thead { display: none; }
  .events tr { display: flex; flex-wrap: wrap; gap: 0 0.75rem; padding: 0.5rem 0;
    border-bottom: 1px solid var(--hair); }
  .events td { padding: 0; border: 0; }
  .events .what { order: -1; }
  .events .step:not(:empty)::before { content: "step "; }
  .events .message, .events .who { flex-basis: 100%; }
}
@media (max-width: 30rem) {
  .tiles { grid-template-columns: 1fr 1fr; }
  .facts > div { grid-template-columns: 7rem 1fr; }
}
@media print {
  :root {
    --page: #fff; --card: #fff; --ink: #111; --soft: #555; --hair: #d5d5d5; --track: #e8e8e8;
    --train: #2a6fdb; --eval: #c8590b; --ema: #0f8a68; --good: #0f8a68; --bad: #c62f3b;
  }
  html { font-size: 10.5px; }
  body { font-size: 1rem; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  h2 { break-after: avoid; margin-top: 1.75rem; }
  .charts { grid-template-columns: 1fr 1fr; }
  .samples { grid-template-columns: repeat(4, 1fr); }
  .tiles { grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); }
  .plot { grid-template-rows: 11rem 1.3rem auto; }
}
"""
