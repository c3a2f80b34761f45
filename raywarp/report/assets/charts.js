"use strict";
// What all charts share: colours from the page's style, tooltips made of elements, drawing when they come into view.

const charts = new Set();

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function policyColour(policy) {
  return colour(`c${(policy - 1) % 8}`);
}

/** A box for a chart that draws itself when it is near the screen, when the colours change, and before printing. */
function chartBox(label, option, { kind = "", height = null, onClick = null, onKey = null } = {}) {
  const element = h("div", { class: `chart ${kind}`, role: "img", "aria-label": label, tabindex: onKey ? "0" : null });
  if (height) element.style.height = `${height}px`;
  const chart = { element, instance: null };
  chart.draw = () => {
    if (!chart.instance) {
      chart.instance = echarts.init(element, null, { renderer: "svg" });
      if (onClick) chart.instance.on("click", onClick);
    }
    chart.instance.setOption({ animation: false, textStyle: { fontFamily: getComputedStyle(document.body).fontFamily, color: colour("soft") }, ...option() }, { notMerge: true });
  };
  chart.wanted = () => (chart.instance ? chart.draw() : null);
  chart.close = () => chart.instance && chart.instance.dispose();
  if (onKey) {
    element.setAttribute("role", "application");
    element.addEventListener("keydown", onKey);
  }
  charts.add(chart);
  element.chart = chart;
  watcher.observe(element);
  return element;
}

const watcher = new IntersectionObserver(
  (entries) => entries.filter((entry) => entry.isIntersecting && !entry.target.chart.instance).forEach((entry) => entry.target.chart.draw()),
  { rootMargin: "300px" },
);

const resizer = new ResizeObserver(() => charts.forEach((chart) => chart.instance && chart.instance.resize()));

function redrawCharts() {
  charts.forEach((chart) => chart.wanted());
}

/** Draw all that has not been on the screen yet, at the paper's width. */
function drawForPrint() {
  charts.forEach((chart) => {
    chart.draw();
    chart.instance.resize();
    chart.instance.getZr().refreshImmediately(); // else in the next frame, which paper does not wait for
  });
}

function closeCharts() {
  charts.forEach((chart) => {
    watcher.unobserve(chart.element);
    chart.close();
  });
  charts.clear();
}

function axis(name, more = {}) {
  return {
    type: "value",
    name,
    scale: true,
    nameLocation: "middle",
    nameTextStyle: { color: colour("soft"), fontSize: 12 },
    axisLine: { lineStyle: { color: colour("line") } },
    axisTick: { show: false },
    axisLabel: { color: colour("faint"), fontSize: 11, hideOverlap: true, formatter: (value) => tickText(value) },
    splitLine: { lineStyle: { color: colour("grid") } },
    ...more,
  };
}

function tickText(value) {
  if (typeof value !== "number") return value;
  const tiny = value !== 0 && Math.abs(value) < 1e-3;
  return (tiny ? value.toExponential(1) : String(Math.round(value * 1e6) / 1e6)).replaceAll("-", "−");
}

/** A tooltip whose content is an element with lines of text. */
function tooltip(lines, more = {}) {
  return {
    confine: true,
    backgroundColor: colour("card"),
    borderColor: colour("line"),
    textStyle: { color: colour("ink"), fontSize: 12.5 },
    extraCssText: "box-shadow: 0 4px 16px rgb(0 0 0 / 18%);",
    formatter: (parameters) => {
      const found = lines(parameters);
      return found.length ? h("div", {}, h("b", {}, found[0]), ...found.slice(1).map((line) => h("div", {}, line))) : null;
    },
    ...more,
  };
}

/** Crosses of 95 % intervals; rows of data are [x, y, half of x's, half of y's, colour]. */
function errorBars(data) {
  return {
    type: "custom",
    silent: true,
    z: 1,
    clip: true,
    data,
    encode: { x: 0, y: 1 },
    tooltip: { show: false },
    renderItem: (_, api) => {
      const [x, y, dx, dy] = [0, 1, 2, 3].map((n) => api.value(n));
      const style = { stroke: data[_.dataIndex][4], lineWidth: 1.2, opacity: 0.75 };
      const line = (from, to) => ({ type: "line", shape: { x1: from[0], y1: from[1], x2: to[0], y2: to[1] }, style });
      const parts = [];
      if (dy > 0) parts.push(line(api.coord([x, y - dy]), api.coord([x, y + dy])));
      if (dx > 0) parts.push(line(api.coord([x - dx, y]), api.coord([x + dx, y])));
      return { type: "group", children: parts };
    },
  };
}
