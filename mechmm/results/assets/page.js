// Unpacks plotly.js and draws every figure of the page: its title stands above it as text, its
// slider below it as a slider of the browser's own, and in the dark it has dark colours.
"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)");
  const DARK = {
    "#1f2328": "#e6edf3", "#59636e": "#9aa4af", "#6e7781": "#9aa4af", "#8c959f": "#768390",
    "#c9d0d8": "#3d4650", "#e6e8eb": "#262c34", "#dddddd": "#3a4149", "#f4f6f8": "#161b22",
    "#ffffff": "#22272e", "#3d4650": "#adbac7", "#2166ac": "#5aa2e0", "#b2182b": "#e5626c",
    "#0072b2": "#4ba3dc", "#6b4c9a": "#a98bdb", "#7f6000": "#c2a032",
  };
  // What is text, and the colours of values, which mean the same in the dark.
  const KEPT = new Set(["colorscale", "text", "ticktext", "hovertext", "name", "source", "label"]);
  const BUTTONS = 28; // pixels above a figure, for its buttons
  const METHODS = new Set(["restyle", "relayout", "update"]);

  function recolored(value, key) {
    if (KEPT.has(key)) return value;
    if (typeof value === "string") return DARK[value.toLowerCase()] ?? value;
    if (Array.isArray(value)) return value.map((item) => recolored(item, key));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, recolored(v, k)]));
  }

  async function unpacked(id) {
    const packed = atob(document.getElementById(id).textContent);
    const bytes = Uint8Array.from(packed, (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  class Drawing {
    constructor(place) {
      this.place = place;
      this.figure = JSON.parse(document.getElementById(`${place.id}-data`).textContent);
      this.sliders = (this.figure.layout.sliders ?? []).map((slider) => this.slider(slider));
      place.replaceChildren();
    }

    slider({ steps = [], active = 0, currentvalue = {} }) {
      const input = document.createElement("input");
      Object.assign(input, { type: "range", min: 0, max: steps.length - 1, step: 1, value: active });
      const name = document.createElement("output");
      const label = document.createElement("label");
      label.className = "slider";
      label.append(`${plain(currentvalue.prefix ?? "")} `, name, input);
      this.place.closest(".plot").append(label);
      const show = () => {
        const step = steps[input.value];
        name.textContent = plain(step.label);
        input.setAttribute("aria-valuetext", name.textContent);
        return METHODS.has(step.method) ? Plotly[step.method](this.place, ...step.args) : null;
      };
      input.addEventListener("input", show);
      return show;
    }

    // The room of the title and of plotly's own slider is not needed.
    layout(isDark) {
      const { title, sliders, ...kept } = this.figure.layout;
      const layout = isDark ? recolored(kept) : structuredClone(kept);
      const margin = { ...layout.margin };
      if (title?.text) {
        layout.height -= Math.max(0, (margin.t ?? 100) - BUTTONS);
        margin.t = BUTTONS;
      }
      layout.paper_bgcolor = "rgba(0,0,0,0)";
      if (isDark) {
        layout.plot_bgcolor ??= "rgba(0,0,0,0)";
        layout.font = { color: DARK["#1f2328"], ...layout.font };
      }
      layout.modebar = { bgcolor: "rgba(0,0,0,0)" };
      if (isDark) Object.assign(layout.modebar, { color: "#768390", activecolor: "#e6edf3" });
      if (touch.matches) layout.dragmode = false;
      return { ...layout, margin };
    }

    async draw(isDark = dark.matches) {
      const { data } = this.figure;
      const layout = this.layout(isDark);
      await Plotly.react(this.place, isDark ? recolored(data) : structuredClone(data), layout, {
        displaylogo: false,
        doubleClick: "reset",
        modeBarButtons: [[this.saving(), "resetScale2d"]],
      });
      for (const show of this.sliders) await show();
      this.cut(layout);
      for (const svg of this.place.querySelectorAll("svg.main-svg")) svg.ariaHidden = "true";
    }

    // Below the lowest slider nothing is drawn.
    cut({ height, margin }) {
      const lowest = Math.min(...(this.figure.layout.sliders ?? []).map(({ y }) => y ?? 0));
      if (!Number.isFinite(lowest) || !height) return;
      const inner = height - margin.t - (margin.b ?? 80);
      this.place.style.height = `${Math.ceil(margin.t + (1 - Math.max(0, lowest)) * inner)}px`;
    }

    // A picture of it as it was made: with its title, in the light.
    saving() {
      const click = (place) => {
        const data = this.figure.data.map((trace, i) => ({
          ...trace, visible: place.data[i].visible,
        }));
        const { sliders, ...layout } = this.figure.layout;
        const { width, height } = layout;
        const filename = plain(layout.title?.text ?? "figure").replace(/[^\p{L}\p{N}]+/gu, "_");
        Plotly.downloadImage({ data, layout }, { format: "png", scale: 2, width, height, filename });
      };
      return { name: "save", title: "Save as a picture", icon: Plotly.Icons.camera, click };
    }
  }

  function plain(text) {
    const letters = { "&lt;": "<", "&gt;": ">", "&amp;": "&", "&#x27;": "'", "&quot;": '"' };
    const bare = String(text).replace(/<\/?(?:b|i|em|strong|sub|sup|span|a|br)\b[^<>]*>/gi, " ");
    return bare.replace(/&(?:lt|gt|amp|#x27|quot);/g, (name) => letters[name]).trim();
  }

  // What scrolls sideways has to be reachable by keyboard.
  function scrolling() {
    for (const box of document.querySelectorAll(".wide")) {
      const wider = box.scrollWidth > box.clientWidth;
      box.classList.toggle("wider", wider);
      if (wider) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  }

  async function start() {
    const script = document.createElement("script");
    script.textContent = await unpacked("plotly");
    document.head.append(script);
    const drawings = [...document.querySelectorAll(".drawing")].map((place) => new Drawing(place));
    const all = async (isDark) => {
      for (const drawing of drawings) await drawing.draw(isDark);
      scrolling();
    };
    await all();
    dark.addEventListener("change", () => all());
    addEventListener("beforeprint", () => dark.matches && all(false));
    addEventListener("afterprint", () => dark.matches && all());
    addEventListener("resize", scrolling);
    document.documentElement.dataset.drawn = drawings.length;
  }

  start().catch((error) => {
    const why = `The figures could not be drawn: ${error}. A browser of 2023 or later can.`;
    for (const place of document.querySelectorAll(".drawing")) place.textContent = why;
    throw error;
  });
})();
