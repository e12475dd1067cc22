"""The page's style sheet. Its colours are those of the plots."""

CSS = """
:root { --bg:#ffffff; --ink:#1f2328; --muted:#5f6871; --line:#d9dde2; --fill:#f4f6f8; --accent:#0072b2;
  --teacher:#3d444c; --hybrid:#0072b2; --sink_only:#c75000; --slots_off:#a8558a; --untuned:#007a5a;
  --good:#00705a; --bad:#b3261e; }
@media (prefers-color-scheme: dark) { :root { --bg:#15181d; --ink:#e7e9ec; --muted:#9aa4af; --line:#343a42;
  --fill:#1d2127; --accent:#56b4e9; --teacher:#c9cfd6; --hybrid:#56b4e9; --sink_only:#f0a03c; --slots_off:#dd9ac4;
  --untuned:#3cc79f; --good:#3cc79f; --bad:#ff8a80; } }
* { box-sizing:border-box; }
html { -webkit-text-size-adjust:100%; }
body { margin:0; background:var(--bg); color:var(--ink);
  font:17px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; }
main { max-width:800px; margin:0 auto; padding:48px 24px 72px; }
.kicker { margin:0; color:var(--accent); font-size:15px; font-weight:600; }
h1 { margin:6px 0 20px; font-size:36px; line-height:1.18; letter-spacing:-.015em; font-weight:700; text-wrap:balance; }
h2 { margin:0 0 12px; font-size:24px; line-height:1.3; letter-spacing:-.01em; }
h3 { margin:32px 0 6px; font-size:18px; }
h4 { margin:0 0 4px; font-size:15px; color:var(--muted); font-weight:600; }
p { margin:0 0 14px; max-width:68ch; }
section { margin-top:64px; }
.verdict { margin:0 0 28px; padding:16px 20px; background:var(--fill); border-left:4px solid var(--muted);
  border-radius:0 6px 6px 0; font-size:18px; line-height:1.55; max-width:none; }
.verdict.good { border-color:var(--good); } .verdict.fair { border-color:var(--accent); }
.verdict.poor { border-color:var(--sink_only); } .verdict.failed { border-color:var(--bad); }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(170px,1fr)); gap:20px 28px; }
.tile { border-top:1px solid var(--line); padding-top:12px; }
.tile b { display:block; font-size:27px; line-height:1.2; font-weight:650; letter-spacing:-.01em;
  font-variant-numeric:tabular-nums; }
.tile span { display:block; margin-top:4px; color:var(--muted); font-size:14.5px; line-height:1.4; }
figure { margin:28px 0; }
figure img { display:block; width:100%; height:auto; }
figcaption { margin-top:8px; color:var(--muted); font-size:14.5px; line-height:1.5; max-width:72ch; }
.scroll { overflow-x:auto; }
table { width:100%; border-collapse:collapse; font-size:15.5px; font-variant-numeric:tabular-nums; }
th, td { padding:9px 12px; border-bottom:1px solid var(--line); text-align:right; vertical-align:top; }
th:first-child, td:first-child { text-align:left; padding-left:0; font-weight:500; }
th:last-child, td:last-child { padding-right:0; }
thead th { color:var(--muted); font-weight:500; font-size:14px; vertical-align:bottom; line-height:1.35; }
tr.strong th, tr.strong td { font-weight:700; }
th small { display:block; color:var(--muted); font-size:13.5px; font-weight:400; line-height:1.4; }
.key { display:inline-block; width:16px; height:4px; margin-right:8px; border-radius:2px; vertical-align:middle;
  background:transparent; }
.key.teacher { background:var(--teacher); } .key.hybrid { background:var(--hybrid); }
.key.sink_only { background:var(--sink_only); } .key.slots_off { background:var(--slots_off); }
.key.untuned { background:var(--untuned); }
details { margin-top:8px; } summary { cursor:pointer; color:var(--accent); font-size:15.5px; padding:6px 0; }
.prompt { color:var(--muted); font-size:15.5px; white-space:pre-wrap; } .prompt b { color:var(--ink); }
.pair { display:grid; grid-template-columns:1fr 1fr; gap:16px; }
.pair > div { background:var(--fill); border-radius:6px; padding:14px 16px; min-width:0; }
.pair p { margin:0; font-size:15.5px; line-height:1.55; white-space:pre-wrap; overflow-wrap:anywhere; }
ul { margin:0 0 14px; padding-left:22px; max-width:68ch; } li { margin:7px 0; }
dl { margin:0; } dt { margin-top:16px; font-size:15.5px; } dd { margin:5px 0 0; }
pre { margin:0; padding:11px 14px; background:var(--fill); border-radius:6px; overflow-x:auto; font-size:14px;
  line-height:1.5; }
code { font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace; font-size:.92em; }
pre code { font-size:inherit; }
footer { margin-top:72px; padding-top:28px; border-top:1px solid var(--line); color:var(--muted); font-size:15px; }
footer h2 { color:var(--ink); font-size:19px; } footer p { max-width:none; }
ul.checks { padding:0; list-style:none; max-width:none; } .yes { color:var(--good); font-weight:600; }
.no { color:var(--bad); font-weight:700; } .checks b { color:var(--ink); font-weight:600; }
@media (max-width:620px) { body { font-size:16px; } main { padding:28px 18px 48px; } h1 { font-size:28px; }
  .pair { grid-template-columns:1fr; } .tiles { grid-template-columns:1fr; gap:14px; }
  .tile b { font-size:24px; } section { margin-top:48px; } th, td { padding:8px 7px; } table { font-size:14.5px; } }
@media print { main { max-width:none; } figure, .pair, tr { break-inside:avoid; } }
"""
