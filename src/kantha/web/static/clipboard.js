// Buttons that copy the command beside them; without a clipboard there are none.
if (navigator.clipboard) {
  for (const button of document.querySelectorAll("button[data-copied]")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(button.parentElement.querySelector("code").textContent);
      button.textContent = button.dataset.copied;
    });
  }
}
