// Draws the curves and maps that the page carries as JSON, each when it comes near the screen, in the page's colours.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches || innerWidth < 600; // a finger scrolls the page
  const config = { responsive: true, displayModeBar: false, displaylogo: false, showTips: false };
  const dashes = ["solid", "dash", "dot", "dashdot"];
  const drawn = new Map();

  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const steps = (text) => Array.from(new Uint32Array(bytes(text).buffer));
  const values = (text) => Array.from(new Float32Array(bytes(text).buffer));
  const colours = () => {
    const style = getComputedStyle(document.documentElement);
    const get = (name) => style.getPropertyValue(name).trim();
    return {
      ink: get("--ink"), soft: get("--soft"), rule: get("--rule"), card: get("--card"),
      of: (n) => get("--c" + (n % 8)),
    };
  };

  const layoutOf = (c, extra) => ({
    margin: { l: 54, r: 10, t: 6, b: 30 }, showlegend: false, autosize: true,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: c.soft, size: 11, family: "system-ui, 'DejaVu Sans', sans-serif" },
    hovermode: "x unified", hoverlabel: { bgcolor: c.card, bordercolor: c.rule, font: { color: c.ink, size: 12 } },
    dragmode: touch ? false : "zoom",
    ...extra,
  });
  const axis = (c, extra) => ({
    gridcolor: c.rule, linecolor: c.rule, zeroline: false, fixedrange: touch, automargin: true, ...extra,
  });

  const drawCurves = (place, chart, log) => {
    const c = colours();
    const traces = chart.curves.map((curve) => {
      const colour = c.of(curve.colour);
      const dots = curve.style === "dots";
      const trace = {
        type: "scatter", name: curve.name, x: steps(curve.x), y: values(curve.y),
        mode: dots ? "lines+markers" : "lines", opacity: curve.style === "thin" ? 0.5 : 1,
        line: { color: colour, width: curve.style === "thin" ? 1 : 1.8, dash: dashes[curve.dash % 4] },
        marker: { color: colour, size: 5 }, hovertemplate: "%{y:.5~g}",
      };
      if (curve.error) {
        trace.error_y = { type: "data", array: values(curve.error), color: colour, thickness: 1, width: 3 };
      }
      return trace;
    });
    const large = traces.some((trace) => trace.y.some((value) => value >= 10000));
    const shapes = chart.marks.map(([at]) => ({
      type: "line", x0: at, x1: at, y0: 0, y1: 1, yref: "paper", layer: "below",
      line: { color: c.soft, width: 1, dash: "dot" },
    }));
    return Plotly.react(place, traces, layoutOf(c, {
      xaxis: axis(c, { hoverformat: ",d", exponentformat: "none", separatethousands: true, title: { text: "" } }),
      yaxis: axis(c, { type: log ? "log" : "linear", exponentformat: "power", nticks: 6, ...(large ? { tickformat: "~s" } : {}) }),
      shapes,
    }), config);
  };

  const drawMap = (place, map) => {
    const c = colours();
    const flat = bytes(map.loads);
    const n = map.steps.length;
    const rows = map.labels.map((_, row) => Array.from(flat.subarray(row * n, (row + 1) * n), (v) => v / map.scale));
    const night = dark.matches;
    const middle = night ? "#30353c" : "#f1f1ee";
    const scale = night
      ? [[0, "#4d8fe0"], [0.5, middle], [1, "#f08a5e"]]
      : [[0, "#2f6db5"], [0.5, middle], [1, "#c8501f"]];
    const height = Math.max(140, Math.min(720, 46 + rows.length * (rows.length > 64 ? 5 : 15)));
    const few = map.groups.length <= 24 ? map.groups : map.groups.filter((_, i) => i % Math.ceil(map.groups.length / 24) === 0);
    return Plotly.react(place, [{
      type: "heatmap", x: map.steps, y: map.labels, z: rows, zmin: 0, zmax: 2, colorscale: scale,
      hovertemplate: "step %{x:,d}<br>%{y}<br>%{z:.2f} of an even load<extra></extra>",
      colorbar: { thickness: 9, outlinewidth: 0, tickvals: [0, 0.5, 1, 1.5, 2], ticktext: ["0", "0.5", "1", "1.5", "2+"], xpad: 4 },
    }], layoutOf(c, {
      height, hovermode: "closest", margin: { l: 60, r: 4, t: 6, b: 30 },
      xaxis: axis(c, { hoverformat: ",d", exponentformat: "none", separatethousands: true, showgrid: false }),
      yaxis: axis(c, {
        type: "category", autorange: "reversed", showgrid: false,
        tickmode: "array", tickvals: few.map(([row]) => map.labels[row]), ticktext: few.map(([, name]) => name),
      }),
    }), config);
  };

  const draw = (figure) => {
    const place = figure.querySelector(".draw");
    const button = figure.querySelector("button");
    const log = button !== null && button.getAttribute("aria-pressed") === "true";
    drawn.set(figure, true);
    return "map" in figure.dataset
      ? drawMap(place, data.maps[figure.dataset.map])
      : drawCurves(place, data.charts[figure.dataset.chart], log);
  };

  const figures = document.querySelectorAll("figure.plot");
  const near = new IntersectionObserver((seen) => {
    for (const { isIntersecting, target } of seen) {
      if (isIntersecting && !drawn.has(target)) draw(target);
    }
  }, { rootMargin: "600px" });
  figures.forEach((figure) => near.observe(figure));
  addEventListener("beforeprint", () => figures.forEach((figure) => drawn.has(figure) || draw(figure)));
  dark.addEventListener("change", () => drawn.forEach((_, figure) => draw(figure)));
  document.querySelectorAll("figure.plot button").forEach((button) => button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
    draw(button.closest("figure"));
  }));

  const find = document.getElementById("find");
  const only = document.getElementById("only");
  const rows = Array.from(document.querySelectorAll("table.config tr[data-key]"));
  const sift = () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word)) || (only !== null && only.checked && !row.classList.contains("differs"));
    }
  };
  if (find) find.addEventListener("input", sift);
  if (only) only.addEventListener("change", sift);
})();
