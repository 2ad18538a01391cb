// Filters the list of runs by words, and allows exactly two to be compared.
"use strict";
(() => {
  const runs = [...document.querySelectorAll(".run")];
  const filter = document.getElementById("filter");
  const compare = document.getElementById("compare");
  const count = document.getElementById("count");
  const texts = runs.map((run) => run.textContent.toLowerCase());

  function update() {
    const words = filter.value.toLowerCase().split(/\s+/);
    runs.forEach((run, i) => (run.hidden = !words.every((word) => texts[i].includes(word))));
    const chosen = runs.filter((run) => run.querySelector("input").checked).length;
    const shown = runs.filter((run) => !run.hidden).length;
    compare.disabled = chosen !== 2;
    count.textContent = `${shown} of ${runs.length} shown, ${chosen} of 2 chosen`;
  }

  document.querySelector("form").addEventListener("input", update);
  filter.addEventListener("keydown", (event) => event.key === "Enter" && event.preventDefault());
  update();
})();
