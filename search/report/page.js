"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const said = document.getElementById("said");
  const dark = matchMedia("screen and (prefers-color-scheme: dark)"); // paper is white
  let printing = false;

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const [ink, line] = ["--ink", "--line"].map((name) => style.getPropertyValue(name).trim());
    return printing ? { ink: "#000000", line: "#bbbbbb" } : { ink, line };
  }

  function layout(figure) {
    const { ink, line } = colours();
    const found = { ...figure.layout, font: { color: ink }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" };
    found.margin = { l: 60, r: 20, t: 30, b: 50 };
    found.legend = { orientation: "h", y: 1.15 };
    found.autosize = true;
    found.modebar = { bgcolor: "rgba(0,0,0,0)", color: line, activecolor: ink };
    for (const name of Object.keys(found).filter((key) => /^[xy]axis/.test(key))) {
      found[name] = { gridcolor: line, zerolinecolor: line, ...found[name] };
    }
    return found;
  }

  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const field = document.createElement("textarea");
      field.value = text;
      document.body.append(field);
      field.select();
      document.execCommand("copy");
      field.remove();
    }
    said.textContent = "copied: " + text;
    document.body.dataset.copied = text;
    setTimeout(() => { said.textContent = ""; }, 4000);
  }

  for (const button of document.querySelectorAll("button[data-copy]")) {
    button.addEventListener("click", () => copy(button.dataset.copy));
  }
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
    recolour(true);
  });
  addEventListener("afterprint", () => recolour(false));

  const places = Object.entries(data.figures).map(([name, figure]) => [document.getElementById("chart-" + name), figure]);
  const drawn = places.map(([place, figure]) =>
    Plotly.newPlot(place, figure.data, layout(figure), { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["sendDataToCloud"] }));
  Promise.all(drawn).then(() => {
    const front = document.getElementById("chart-front");
    if (front) {
      front.on("plotly_click", (event) => {
        const command = data.commands[event.points[0].customdata];
        if (command) copy(command);
      });
    }
    document.body.dataset.drawn = String(drawn.length);
  });
  function recolour(forPaper) {
    printing = forPaper;
    for (const [place, figure] of places) Plotly.relayout(place, layout(figure));
  }
  dark.addEventListener("change", () => recolour(printing));
})();
