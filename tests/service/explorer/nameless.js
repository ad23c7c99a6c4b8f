// Controls without a name that a screen reader could say.
[...document.querySelectorAll('a, button, input, textarea, select, [role=treeitem], [tabindex="0"]')]
  .filter((one) => one.checkVisibility())
  .filter((one) => !(one.getAttribute('aria-label') || one.textContent.trim() || one.labels?.length))
  .map((one) => one.outerHTML.slice(0, 120))
